"""The FORMAT of a lock: by which version's meaning a merge was made, and what has changed since.

A change of meaning (another plan of the same recipe and models) or of bits (other bytes of the same plan) counts FORMAT
up by one and gets its line in CHANGES. Not here: how a lock is read and compared (planning.lockfile).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from merger.models.architecture import is_stack_of_matrices


@dataclass(frozen=True)
class FormatChange:
    """What a recipe means otherwise, or what comes out otherwise, from a format on.

    Args:
        format: the first that has it.
        what: a sentence for readers, such as "dare_ties draws other masks".
        methods: those of which the same plan gives other bits; a change of meaning shows in the plan itself.
        tensors: of which tensors they give other bits, by name and shape.
    """

    format: int
    what: str
    methods: frozenset[str] = frozenset()
    tensors: Callable[[str, tuple[int, ...]], bool] = lambda name, shape: True

    def touches(self, method: str, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a method makes other bits of a tensor than it did."""
        return method in self.methods and self.tensors(name, shape)


CHANGES: tuple[FormatChange, ...] = (
    FormatChange(
        2,
        "layers of multi-token prediction belong to no stack: they are kept from the base model where others have "
        "none, lie behind the last layer, and config.json counts those that are there",
    ),
    FormatChange(2, "tensors that hold something of every layer (per-layer embeddings) are stacked with the layers"),
    FormatChange(
        2,
        "a text with a letter for a layer (hybrid_override_pattern) follows a stack's layers, and what config.json "
        "nests under llm_config or language_config is the language model's",
    ),
    FormatChange(2, "a token that is plain in the base's tokenizer and special in another's is special under union"),
    FormatChange(
        2,
        "of experts in one tensor each is a matrix of its own",
        frozenset({"iso_c", "iso_cts", "knots", "subspace_boosting", "svc", "tsvm"}),
        is_stack_of_matrices,
    ),
    FormatChange(
        2, "a tensor of a LoRA adapter that has no name of the model's files is placed by layer, role and tower"
    ),
    FormatChange(3, "tensors in the folders of a pipeline of sentence-transformers are merged; they were the base's"),
    FormatChange(
        3,
        "norms, angles and energies are summed in another order, and singular vectors are numpy's: a factor may differ "
        "in float64's last bits, and an entry in a thousand million in its own",
    ),
    FormatChange(
        3,
        "products of matrices are numpy's (LoRA added, merged and extracted, tokens by pursuit, routers from prompts): "
        "the last bit of an entry may differ, and an extraction begins with other directions",
    ),
    FormatChange(
        3,
        "random masks are drawn by another generator (Threefry4x32-20)",
        frozenset({"dare_linear", "dare_ties", "della", "della_linear"}),
    ),
    FormatChange(
        3,
        "a result has the files of its config model, with the same tensors in each, where all are within the shard "
        "size; they were cut by size",
    ),
    FormatChange(
        3, "with --allow-pickle steps of sentence-transformers in pytorch_model.bin are merged; they were left out"
    ),
)

FORMAT = 3
"""That of a plan made now: a part of its hash."""


def since(format: int) -> tuple[FormatChange, ...]:
    """What has changed after a format, in order."""
    return tuple(change for change in CHANGES if change.format > format)
