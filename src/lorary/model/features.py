"""One vector for a whole request: the mean of early hidden states of the base, or what a sentence encoder makes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoTokenizer

from lorary.data.batching import length_buckets
from lorary.data.encoder import embed_texts
from lorary.data.text_of_ids import text_of_ids
from lorary.errors import RouterError, UsageError
from lorary.formats.quiet import quiet_transformers
from lorary.library.store import Library
from lorary.lora.targets import language_paths
from lorary.model.early import early_pass
from lorary.model.prepared import REQUEST, TASKS, PreparedTensors, not_prepared
from lorary.ops.upload import upload
from lorary.route import ROUTERS
from lorary.route.setting import Routing

MAX_TOKENS = 2048
# (rows, seq, d) hidden states, (rows, seq) ids or None, (rows, seq) which are real -> (rows, features).
Embed = Callable[[Tensor, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class Featured:
    """How requests are scored by one vector each.

    Args:
        embed: makes the vectors.
        rule: the pure function from vectors and what was prepared to scores.
        prepared: what the rule made of what was prepared for each expert that may be chosen; it follows a tensor by
            `to`. Those that may not play no part, as if they were not in the library.
        alive: (experts,) bool, whether each expert may be chosen.
        usable: int64, the positions of those that may.
    """

    embed: Embed
    rule: Callable[[Tensor, Any], Tensor]
    prepared: Any
    alive: Tensor
    usable: Tensor

    def to(self, device: torch.device) -> "Featured":
        """The same on a device."""
        prepared = None if self.prepared is None else self.prepared.to(device)
        return replace(self, prepared=prepared, alive=upload(self.alive, device), usable=upload(self.usable, device))

    def scores(self, hidden: Tensor, ids: Tensor | None, real: Tensor) -> Tensor:
        """(rows, experts) scores, 0 for experts that may not be chosen; see `Embed` for what they come from."""
        vectors = self.embed(hidden, ids, real)
        scores = vectors.new_zeros(len(vectors), len(self.alive), dtype=torch.float64)
        if self.prepared is not None:
            scores = scores.index_copy(1, self.usable, self.rule(vectors, self.prepared.to(vectors)).double())
        return scores


def mean_hidden(hidden: Float[Tensor, "batch seq d"], real: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch d"]:
    """The mean of hidden states over the real tokens of each row.

    Args:
        hidden: of the bare base.
        real: False at padding, and at tokens that are no prompt.

    Returns:
        At least float32: sums in half precision depend on their order.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide.masked_fill(~real[..., None], 0.0).sum(dim=1) / real.sum(dim=1, keepdim=True)


def texts_of(tokenizer: Any, ids: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]) -> list[str]:
    """The text of each row, without padding and special tokens."""
    token_ids = [row[mask].tolist() for row, mask in zip(ids.cpu(), real.cpu(), strict=True)]
    return [text_of_ids(tokenizer, row, special=False) for row in token_ids]


def hidden_embedding(hidden: Tensor, ids: Tensor | None, real: Tensor) -> Tensor:
    """Vectors by the base itself: `mean_hidden`, whatever the tokens were."""
    return mean_hidden(hidden, real)


@dataclass(frozen=True)
class TextEmbedding:
    """Vectors by the packaged sentence encoder, which is no part of this: a routed model is copied without it.

    Args:
        tokenizer: of the base; it makes the text from the tokens.
    """

    tokenizer: Any

    def __call__(self, hidden: Tensor, ids: Tensor | None, real: Tensor) -> Tensor:
        """The vectors of the real tokens of each row."""
        if ids is None:
            raise UsageError("features='text' needs the tokens of a request", found="inputs_embeds without input_ids")
        return embed_texts(texts_of(self.tokenizer, ids, real)).to(hidden.device)


def embedding(setting: Routing, model: Any, tokenizer: Any) -> Embed:
    """What makes the vectors that a setting asks for.

    Args:
        setting: of a router that looks at whole requests.
        model: the base.
        tokenizer: its tokenizer, None where it was not given.

    Raises:
        UsageError: if it needs a tokenizer, and there is none.
    """
    if setting.options.features == "hidden":
        return hidden_embedding
    return TextEmbedding(tokenizer or own_tokenizer(model))


def featured(
    setting: Routing,
    embed: Embed,
    library: Library,
    experts: Sequence[str],
    alive: Bool[Tensor, " experts"],
    prepared: PreparedTensors,
) -> Featured:
    """Scores for whole requests, from what was prepared.

    Args:
        setting: of a router that looks at whole requests.
        embed: makes the vectors.
        library: where the experts came from.
        experts: names, in canonical order.
        alive: whether each expert changes anything; one that does not is never chosen.
        prepared: what was prepared, by expert.

    Raises:
        RouterError: naming the first expert for which nothing was prepared, or not of the others' shape.
    """
    rule = ROUTERS[setting.router]
    assert rule.request is not None
    tensors: list[Tensor] = []
    for name in experts:
        if REQUEST not in prepared.get(name, {}):
            raise not_prepared(setting, library, name, "whole requests")
        tensors.append(prepared[name][REQUEST])
        if (tensors[-1].dim(), tensors[-1].shape[-1]) != (tensors[0].dim(), tensors[0].shape[-1]):
            raise RouterError(
                f"what was prepared for expert '{name}' must have the shape it has for the others",
                found=f"{tuple(tensors[-1].shape)} beside {tuple(tensors[0].shape)}",
                remedy="lorary library prepare",
            )
    alive = alive & torch.tensor([setting.may_choose(name) for name in experts])
    usable = [(name, tensor) for name, tensor, ok in zip(experts, tensors, alive.tolist(), strict=True) if ok]
    tasks = [prepared[name].get(TASKS, torch.zeros(len(tensor), dtype=torch.int64)) for name, tensor in usable]
    fitted = rule.fit([tensor for _, tensor in usable], tasks) if usable else None
    return Featured(embed, rule.request, fitted, alive, alive.nonzero().squeeze(1))


@torch.no_grad()
def prompt_vectors(model: Any, embed: Embed, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "prompts features"]:
    """The vectors of prompts, as a request with that prompt would get them: from the base's first layers.

    Args:
        model: the bare base model.
        embed: makes them.
        prompts: token ids, at least one prompt.

    Returns:
        On the CPU, in the order given.
    """
    vectors: dict[int, Tensor] = {}
    for bucket, ids, real in prompt_batches(model, prompts):

        def look(hidden: Tensor, bucket: list[int] = bucket, ids: Tensor = ids, real: Tensor = real) -> bool:
            vectors.update(zip(bucket, embed(hidden, ids, real.to(hidden.device)).cpu(), strict=True))
            return True

        early_pass(decoder_of(model), {"input_ids": ids, "use_cache": False}, look)
    return torch.stack([vectors[i] for i in range(len(prompts))])


@torch.no_grad()
def last_vectors(model: Any, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "prompts d"]:
    """What prompts look like behind all layers of the base: `mean_hidden` of its last hidden states.

    Args:
        model: the bare base model.
        prompts: token ids, at least one prompt.

    Returns:
        On the CPU, in the order given.
    """
    vectors: dict[int, Tensor] = {}
    for bucket, ids, real in prompt_batches(model, prompts):
        hidden = decoder_of(model)(input_ids=ids, use_cache=False)[0]
        vectors.update(zip(bucket, mean_hidden(hidden, real.to(hidden.device)).cpu(), strict=True))
    return torch.stack([vectors[i] for i in range(len(prompts))])


def prompt_batches(model: Any, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Prompts in batches of about one length.

    Args:
        model: whose device they go to.
        prompts: token ids.

    Yields:
        Which prompts, their (batch, seq) ids, padded on the right, which nothing sees, and which tokens are real.
    """
    for bucket in length_buckets([len(prompt) for prompt in prompts], MAX_TOKENS):
        ids = torch.zeros(len(bucket), max(len(prompts[i]) for i in bucket), dtype=torch.int64)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(bucket):
            ids[row, : len(prompts[i])], real[row, : len(prompts[i])] = torch.tensor(prompts[i]), True
        yield list(bucket), ids.to(model.device), real.to(model.device)


def decoder_of(model: Any) -> Any:
    """The model without its head, as it is called: what hidden states come from.

    Some models call the decoder inside of it and never itself (OPT, BART). Of a multimodal one it is all that comes
    before the head.
    """
    backbone = getattr(model, "base_model", model)
    inner = getattr(backbone, "decoder", None)
    is_alone = inner is not None and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return inner if is_alone and not language_paths(model) else backbone


def own_tokenizer(model: Any) -> Any:
    """The tokenizer that lies beside the base's own files.

    Raises:
        UsageError: if there is none.
    """
    folder = Path(str(getattr(model, "name_or_path", "") or " "))
    try:
        if not folder.is_dir():
            raise OSError(f"'{folder}' is no folder" if folder.name.strip() else "the model has no files")
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise all kinds over a file they cannot read
        raise UsageError(
            "features='text' needs the base's tokenizer, to make text from tokens",
            found=str(error).strip().splitlines()[0][:200],
            remedy="lorary.attach(..., tokenizer=tokenizer)",
        ) from error
