"""Token ids and the rows of the embedding: a tokenizer may know tokens that its model was never given."""

from typing import Any

from lorary.errors import BaseModelError


def embedded_tokens(model: Any) -> int:
    """How many token ids a model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_embedded(tokenizer: Any, num_embeddings: int, name: str) -> None:
    """Refuse a tokenizer whose every text holds an id that the model has no embedding for.

    Args:
        tokenizer: of the base model.
        num_embeddings: of the model's embedding.
        name: the model in error messages.

    Raises:
        BaseModelError: if that is the EOS token, or one that stands around every text (BOS).
    """
    for token in [tokenizer.eos_token_id, *tokenizer("")["input_ids"]]:
        if token >= num_embeddings:
            raise BaseModelError(
                f"the tokens that the tokenizer of the base model {name} puts around texts must be in its embedding",
                found=f"{tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, "
                f"the embedding {num_embeddings} rows",
                remedy="use the tokenizer that belongs to these weights, or resize the embedding and save the model",
            )


def guard_embedding(model: Any, tokenizer: Any, num_embeddings: int) -> None:
    """Have a model refuse by name the tokens that only its tokenizer knows; nothing is added where there are none.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        num_embeddings: of the model's embedding.
    """
    highest = max([len(tokenizer) - 1, *tokenizer.added_tokens_decoder])
    if highest >= num_embeddings:
        outside = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if i >= num_embeddings}
        model.get_input_embeddings().register_forward_pre_hook(_Guard(num_embeddings, outside))


class _Guard:
    """A hook before the embedding; a class, since a model that holds it must survive a pickle."""

    def __init__(self, num_embeddings: int, outside: dict[int, str]) -> None:
        self._num_embeddings = num_embeddings
        self._outside = outside

    def __call__(self, _module: Any, args: tuple[Any, ...]) -> None:
        highest = int(args[0].max()) if args and args[0].numel() else 0
        if highest >= self._num_embeddings:
            raise BaseModelError(
                f"every token of a text must be in the {self._num_embeddings} rows of the base model's embedding",
                found=f"the id {highest}, {self._outside.get(highest, 'a token')!r}",
                remedy="leave that token out of texts and templates, or resize the embedding and save the model",
            )
