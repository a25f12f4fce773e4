"""`python -m tests.claims [NAME ...]`: all that can be run here, or the ones named."""

import inspect
import pathlib
import sys

from tests.claims import adapters, distillation, ppo, preference, reward
from tests.shared import SHARED

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "claims"
CLAIMS = {
    "embedded": preference.embedded_world,
    "methods": preference.preference_methods,
    "distill": distillation.distilled,
    "demo": preference.demo_files,
    "adapters": adapters.adapters,
    "real": preference.real_input,
    "reward": reward.embedded_pairs,
    "ensemble": reward.ensemble,
    "rankings": reward.embedded_rankings,
    "reward_real": reward.dialogues,
    "ppo": ppo.embedded_ppo,
}
NEED_SHARED = ("demo", "real", "reward", "ensemble", "reward_real")


def write(name: str, rows: list[tuple]) -> bool:
    """docs/claims/NAME.md; whether every claim held."""
    lines = [f"# {name}", "", inspect.getdoc(CLAIMS[name]), "", f"`python -m tests.claims {name}`, 2 CPU cores", ""]
    lines += ["| what | run | measured | claimed | held |", "|---|---|---|---|---|"]
    lines += [
        f"| {what} | {how} | {value:.4f} | {claim} | {'yes' if held else '**no**'} |"
        for what, how, value, claim, held in rows
    ]
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return all(row[-1] for row in rows)


def main(names: list[str]) -> int:
    if unknown := set(names) - set(CLAIMS):
        sys.exit(f"unknown claims {sorted(unknown)}; there are {', '.join(CLAIMS)}")
    names = names or [name for name in CLAIMS if name not in NEED_SHARED or SHARED.is_dir()]
    return 0 if all([write(name, CLAIMS[name]()) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
