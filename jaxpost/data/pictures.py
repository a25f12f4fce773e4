"""Pictures as PNG. They need matplotlib (extra `plot`), which is imported here and nowhere else."""

from etils import epath

from jaxpost.errors import UserError


def new_figure(what: str, **settings):
    """An empty Figure; settings are its own. Raises UserError, whose subject is `what`, without matplotlib."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no state
    except ImportError:
        raise UserError(f"{what} needs matplotlib: pip install 'jaxpost[plot]'") from None
    return Figure(layout="constrained", **settings)


def save(figure, path) -> None:
    """Writes a Figure; the folder is made where it is missing. path: local or gs://."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
