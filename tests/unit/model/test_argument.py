"""What is given for a model and is none is named, with the way to a model."""

from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from lorary.errors import UsageError
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.model.base import load_base
from lorary.model.save import load, save
from lorary.model.seating import seating
from lorary.model.trace import trace

Make = Callable[..., Any]


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path, tiny_model: Make, random_adapter: Make, generator: Any) -> Library:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for name in ("sky", "sum"):
        library.add_adapter(random_adapter(tiny_model(), name, generator), {"tasks": [name]})
    return library


def test_what_is_no_bare_model_is_refused_by_name(
    library: Library, tiny_base_folder: Path, tiny_model: Make, tiny_tokenizer: Any
) -> None:
    wrapped = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrong: list[tuple[Any, str]] = [
        (str(tiny_base_folder), rf"found: the path '{tiny_base_folder}'\nremedy: lorary\.load_base\('.*'\)\.model"),
        (tiny_base_folder, r"found: the path .*\nremedy: lorary\.load_base\("),
        (load_base(str(tiny_base_folder)), r"found: a lorary\.Base.*\nremedy: give its \.model"),
        (tiny_tokenizer, r"found: a tokenizer .*\nremedy: give the model here, and this as tokenizer="),
        (library, r"found: a library\nremedy: give the model first"),
        (
            wrapped,
            r"found: a model wrapped by PEFT \(PeftModelForCausalLM\)\nremedy: give what its unload\(\) returns, or",
        ),
        (None, r"found: NoneType\nremedy: lorary\.load_base"),
    ]
    for given, message in wrong:
        with pytest.raises(UsageError, match=message):
            attach(given, library)
    for given, message in wrong[:4]:
        with pytest.raises(UsageError, match=message), routing(given, "base"):
            pass
        with pytest.raises(UsageError, match=message):
            detach(given)
    assert attach(wrapped.unload(), library).generate is not None


def test_a_library_where_a_path_is_wanted_is_refused_by_name(library: Library) -> None:
    calls: list[Callable[[], Any]] = [  # without the type checker of the tests
        lambda: unwrap(Library.open)(Library, library),
        lambda: unwrap(Library.create)(Library, library),
        lambda: unwrap(Library.add)(library, library),
        lambda: unwrap(load)(library),
        lambda: unwrap(save)(None, library),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"must be a text or a Path\nfound: Library\nremedy: an open library has"):
            call()


def test_what_is_attached_shows_itself_in_a_line(library: Library, tiny_model: Make) -> None:
    import torch

    model = attach(tiny_model(), library, top_k=1)
    with trace(model) as traced:
        assert repr(traced) == "Trace(nothing recorded in 6 layers)"
        model(input_ids=torch.ones(2, 5, dtype=torch.int64))
    assert repr(traced) == "Trace(6 layers, batch 2, seq 5, experts ['sky', 'sum'])"
    assert '<td style="text-align:left">sky</td>' in traced._repr_html_()
    page = library._repr_html_()
    assert "<caption>Library(&#x27;" in page
    assert '<td style="text-align:left">sum</td>' in page
    assert repr(seating(model)).startswith(
        "Seating(2 experts ['sky', 'sum'] in 6 layers, {'router': 'arrow', 'top_k': 1"
    )
    with routing(model, ["base", "arrow"]):
        assert "[{'router': 'base'" in repr(seating(model))
    assert "GatedLora(\n    experts=2, ranks=6, mix=outputs" in repr(model.model.layers[0].self_attn.q_proj)


def test_transformers_own_saving_says_what_it_leaves_out(library: Library, tiny_model: Make, tmp_path: Path) -> None:
    model = attach(tiny_model(), library)
    with pytest.warns(UserWarning, match=r"without the experts.*lorary\.save"):
        model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "config.json").is_file()
    save(model, tmp_path / "whole", copy_base=True)  # says nothing
    detach(model).save_pretrained(tmp_path / "bare")  # neither
    assert "save_pretrained" not in vars(model)
