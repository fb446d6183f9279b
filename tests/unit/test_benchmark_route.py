"""The routing benchmark compares like with like, on a random tiny model."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from lorary.route import ROUTERS

pytest.importorskip("peft")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Scripts(NamedTuple):
    """The scripts of the benchmark."""

    route: ModuleType
    models: ModuleType
    turns: ModuleType
    floor: ModuleType
    page: ModuleType


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the benchmarks read memory from /proc, which this system does not have")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import route
    import route_floor
    import route_models
    import route_page
    import route_turns

    return Scripts(route, route_models, route_turns, route_floor, route_page)


@pytest.fixture
def rows(scripts: Scripts, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The rows of a whole run over the tiny model: `rows({"prefill-8", "attach"})`."""
    case = scripts.turns.Case
    cases = (case("prefill-8", 8), case("prefill-12", 12), case("decode-2", 1, batch=2, cached=6))
    monkeypatch.setattr(scripts.route, "CASES", cases)
    monkeypatch.setattr(scripts.route, "load_model", lambda _: tiny_model())
    monkeypatch.setattr(scripts.turns, "MOST_PEER_TOKENS", 8)
    for module in (scripts.route, scripts.turns):
        monkeypatch.setattr(module, "MOST_PEER_EXPERTS", 5)

    def run(wanted: set[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = scripts.route.run_base("tiny", wanted, (4, 6), seconds=0.0, all_rules=False)
        return found

    return run


def test_every_contender_has_its_rows(scripts: Scripts, rows: Any, tmp_path: Path) -> None:
    table = {(row["case"], row["figure"]): row for row in rows({"prefill-8", "prefill-12", "decode-2", "attach"})}
    rules = {name for name, rule in ROUTERS.items() if rule.needs == "weights" and not rule.tries}
    assert {name for case, name in table if case == "tiny prefill-8 E=4"} == rules | {"auto"}
    assert {name for case, name in table if case == "tiny prefill-8 E=6"} == {"arrow", "auto"}
    assert {case for case, _ in table if case.startswith("tiny prefill-12")} == {
        "tiny prefill-12 E=4",
        "tiny prefill-12 E=6",
    }
    for case in ("prefill-8", "decode-2"):
        arrow = table[f"tiny {case} E=4", "arrow"]
        assert arrow["ratio_to_base"] == pytest.approx(arrow["ours"] / arrow["base"])
        assert arrow["ratio_to_peer"] == pytest.approx(arrow["ours"] / arrow["peer"])
        assert arrow["base"] < arrow["floor"]
        assert 1 < arrow["floor_ratio"] < 2
        assert table[f"tiny {case} E=1", "one expert"]["peer"] > 0
        assert table[f"tiny {case} E=1", "one expert, merged"]["ours"] is None
        assert "not run" in table[f"tiny {case} E=6", "arrow"]["note"]
    assert table["tiny prefill-8 E=4", "base"]["floor_ratio"] == 1
    assert table["tiny attach E=6", "time to attach"]["peer"] > 0
    report = tmp_path / "report.md"
    scripts.page.save_report(list(table.values()), report, command="python benchmarks/route.py --all", load=0.5)
    text = report.read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == len(table) + 1
    assert "load 0.5 before" in text
    assert "\npython benchmarks/route.py --all\n" in text


def test_all_contenders_compute_the_same_adapter(scripts: Scripts, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    shelf = scripts.models.Shelf("tiny", model, tmp_path)
    shelf.grow(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    routed, seconds = shelf.attach(repeats=2)
    assert seconds > 0
    ids = torch.arange(1, 9)[None]
    found = []
    for contender in scripts.models.single_contenders(shelf, routed):
        with torch.no_grad(), contender.turn() as side:
            found.append(side(input_ids=ids).logits)
    bare = model(input_ids=ids).logits
    for logits in found[1:]:
        assert (logits - found[0]).abs().max() < 1e-4 * (found[0] - bare).abs().max()
    # Merging and seating have left the base alone.
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_peft_that_takes_too_long_is_stopped_and_counted(scripts: Scripts, tiny_model: Any, tmp_path: Path) -> None:
    shelf = scripts.models.Shelf("tiny", tiny_model(), tmp_path)
    shelf.grow(20)
    model, _, loaded = shelf.attach_peer(0.0)
    assert model is None
    assert loaded < 20
    whole, _, all_of_them = shelf.attach_peer(60.0)
    assert whole is not None
    assert all_of_them == 20


def test_the_floor_counts_what_each_rule_needs(scripts: Scripts) -> None:
    def products(rule: str | None, experts: int, **settings: int) -> list[tuple[int, int]]:
        routed = scripts.floor.Routed(ROUTERS[rule] if rule else None, experts, rank=4, top_k=4, **settings)
        found: list[tuple[int, int]] = routed.products(100, 70)
        return found

    assert products("arrow", 64) == [(100, 64), (100, 16), (16, 70)]
    assert products("arrow", 3) == [(100, 3), (100, 12), (12, 70)]
    assert products("projection", 64) == [(100, 256), (256, 4), (16, 70)]
    assert products("lag", 64, candidates=20) == [(100, 64), (100, 80), (80, 4), (16, 70)]
    assert products("uniform", 64) == [(100, 256), (256, 70)]
    assert products(None, 1) == [(100, 4), (4, 70)]
    assert products("base", 64) == []


def test_the_base_is_counted_with_its_attention(scripts: Scripts, tiny_model: Any) -> None:
    model = tiny_model()
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the head is tied to the embeddings
    assert scripts.floor.base_count(model, context=10.0) == weights + 2 * 10 * 32 * 2


def test_all_sides_take_turns_and_have_two_at_least(scripts: Scripts) -> None:
    times = {"base": 1.0, "ours": 2.0, "slow": 60.0}
    order: list[str] = []

    def turn(name: str) -> Any:
        return lambda: order.append(name) or times[name]

    found = scripts.turns.take_turns({name: turn(name) for name in times}, 0.0)
    assert order == ["base", "ours", "slow", "base", "ours", "slow"]
    assert found == {"base": [1.0, 1.0], "ours": [2.0, 2.0], "slow": [60.0, 60.0]}


def test_decoding_leaves_the_cache_as_it_was(scripts: Scripts, tiny_model: Any) -> None:
    model = tiny_model()
    work = scripts.turns.Work(scripts.turns.Case("decode", 1, batch=2, cached=6), model)
    before = work.cache.layers[0].keys.clone()
    assert work.seconds(model) > 0
    assert torch.equal(work.cache.layers[0].keys, before)


def test_auto_decides_once_where_a_request_begins_and_steps_are_timed_without_it(
    scripts: Scripts, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    shelf = scripts.models.Shelf("tiny", model, tmp_path)
    shelf.grow(4)
    work = scripts.turns.Work(scripts.turns.Case("decode", 1, cached=6), model)
    routed, _ = shelf.attach(repeats=1)
    auto = next(one for one in scripts.models.routed_contenders(routed, 4, all_rules=False) if one.name == "auto")
    assert auto.decides_once
    lengths: list[int] = []
    routed.get_input_embeddings().register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    before = work.cache.layers[0].keys.clone()
    with auto.turn() as side, torch.no_grad():
        assert work.seconds(side, own_cache=auto.decides_once) > 0
    assert lengths == [6, 6] + [1] * scripts.turns.DECODE_STEPS  # the decision, the prompt, the steps
    assert torch.equal(work.cache.layers[0].keys, before)


def test_a_picture_shows_every_line_inside_its_frame(scripts: Scripts) -> None:
    series = {"arrow": [(10, 1.1), (64, 1.4), (256, 1.8)], "PEFT arrow": [(10, 4.0), (64, 21.0)], "norm": [(10, 0.98)]}
    picture = ElementTree.fromstring(scripts.page.ratio_svg("embedded, decode-1", series))
    lines = [one.get("points", "") for one in picture.iter() if one.tag.endswith("polyline")]
    places = [[tuple(map(float, place.split(","))) for place in line.split()] for line in lines]
    assert [len(line) for line in places] == [3, 2, 1]
    for line in places:
        for x, y in line:
            assert 0 <= x <= scripts.page.WIDTH - scripts.page.RIGHT + 0.1
            assert 0 <= y <= scripts.page.HEIGHT
    assert places[0][0][1] > places[0][2][1]  # slower is higher
    middle = (places[0][1][0] - places[0][0][0]) / (places[0][2][0] - places[0][0][0])
    assert middle == pytest.approx(math.log(6.4) / math.log(25.6), abs=0.01)


def test_words_that_name_nothing_are_refused(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["route.py", "--only", "embedded,decode-3"])
    with pytest.raises(SystemExit):
        scripts.route.main()
    assert "decode-3" in capsys.readouterr().err
