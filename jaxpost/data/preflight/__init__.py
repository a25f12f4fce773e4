"""Preflight: what silently ruins a run is refused before it, by name, with the file and line of the first example.

Four kinds of evidence: what was dropped while reading (`findings`), the tokens of the documents (`documents`), some
examples rendered once more in disguise (`examples`), and the eye (`show`, `measure`, `plot`).
"""

from jaxpost.data.dataset import Dataset
from jaxpost.data.preflight.documents import check_documents
from jaxpost.data.preflight.examples import check_examples
from jaxpost.data.preflight.findings import REFUSALS, Finding, Problem, drops, group, refuse
from jaxpost.data.preflight.measure import Lengths, duplicates, measure
from jaxpost.data.preflight.show import show_examples, show_row
from jaxpost.data.templates import Template
from jaxpost.data.tokenizers import Tokenizer

__all__ = [
    "REFUSALS",
    "Finding",
    "Lengths",
    "Problem",
    "check",
    "duplicates",
    "measure",
    "refuse",
    "show_examples",
    "show_row",
]


def check(
    dataset: Dataset,
    *,
    tokenizer: Tokenizer,
    template: Template,
    vocab_size: int,
    max_dropped: float,
    on_long: str,
    most_documents: int | None = None,
    most_examples: int | None = None,
) -> list[Finding]:
    """What is wrong with a dataset, by the names in REFUSALS; empty where nothing is.

    vocab_size: of the model. max_dropped: largest share of the examples that may be dropped. on_long: what the reading
    did with long examples. most_documents, most_examples: how many are looked at, at even distances; None = all.
    """
    seen, problems = check_documents(dataset.documents, tokenizer, vocab_size, most_documents)
    rendered, more = check_examples(dataset, tokenizer, template, most_examples)
    return [  # the report comes last: of documents tokenised on demand it counts what has been read so far
        *drops(dataset.report, max_dropped, on_long),
        *group(problems, seen, "documents"),
        *group(more, rendered, "examples rendered again"),
    ]
