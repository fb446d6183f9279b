"""Numbers from outside: every setting refuses what is none, or too large for any use, by its own name."""

import math
import subprocess
import sys

import pytest

from lorary.build.cluster_settings import ClusterSettings
from lorary.build.settings import BuildSettings, RunSettings
from lorary.errors import UsageError
from lorary.numbers import check_count, check_number, check_seed, is_number, shown
from lorary.route.setting import Routing

HUGE = 10**400
# In a process of its own, where annotations are not checked while it runs: users have no such check.
SWEEP = """
import dataclasses, math
from lorary.errors import LoraryError
from lorary.route.setting import Choosing, RuleOptions, Routing
from lorary.adapt.settings import AdaptSettings
from lorary.build.settings import BuildSettings, RunSettings
from lorary.build.cluster_settings import ClusterSettings
from lorary.evaluate.settings import EvaluateSettings
from lorary.build.methods import PolySettings
from lorary.prepare.settings import GateSettings, PrepareSettings

NO_NUMBERS = [10**400, -10**400, 10**5000, math.nan, -math.inf, "4", [4], {"a": "x"}, b"4", True, 4j]
OPTIONAL = "epochs train_rows upper_layers patience rank sk top_p threshold null private_steps private_epochs".split()
ROUTINGS = [{"router": value} for value in (["arrow"], {"a": 1}, 5, None, 10**400)]
WEIGHTS = [10**400, math.nan, math.inf, 1e300, 1e30, "1", True, None]
ROUTINGS += [{"experts": {"a": value, "b": 1.0}} for value in WEIGHTS]
ROUTINGS += [{"experts": {1: 1.0}}, {"experts": 5}, {"allow": 10**400}, {"general": {"a": 1}}, {"mix": ["outputs"]}]
ROUTINGS += [{"scale": ["unit"]}, {"per": 4}, {"features": ["hidden"]}, {"tie": {}}]

def tried(what, cls, fields, words):
    try:
        cls(**fields)
    except LoraryError as error:
        text = str(error).replace("-", "_").lower()
        if words.lower() not in text or len(text) > 600:
            print(what, "does not say", words, text[:200])
    except BaseException as error:
        print(what, type(error).__name__, str(error)[:200])
    else:
        print(what, "passed")

number = 0
for cls, fields in [(BuildSettings, {}), (RunSettings, {}), (AdaptSettings, {"method": "lorahub"}),
                    (ClusterSettings, {}), (EvaluateSettings, {}), (PolySettings, {}),
                    (PrepareSettings, {"router": "phatgoose"}), (GateSettings, {}), (Choosing, {}), (RuleOptions, {})]:
    for field in dataclasses.fields(cls):
        if not (type(field.default) in (int, float) or field.name in OPTIONAL):
            continue
        own = {**fields, **({"steps": None} if field.name == "epochs" else {})}
        for value in NO_NUMBERS:
            number += 1
            said = field.name.removesuffix("_s")
            tried(f"{cls.__name__}.{field.name}={str(type(value))}", cls, {**own, field.name: value}, said)
for fields in ROUTINGS:
    number += 1
    (name, value), = fields.items()
    tried(f"{name} {type(value)}", Routing.of, fields, name.removesuffix("s"))
print("tried", number)
"""


def test_what_is_no_number_is_refused_by_the_name_of_its_field_and_never_by_a_raw_error() -> None:
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, check=True)
    *wrong, last = done.stdout.splitlines()
    assert wrong == []
    assert int(last.split()[1]) > 500


@pytest.mark.parametrize("value", [1e300, 1e-300, -0.0, 0.0])
def test_temperatures_that_leave_what_scores_can_hold_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match="temperature must be"):
        Routing.of(temperature=value)
    with pytest.raises(UsageError, match="temperature must be"):
        Routing.of(temperature={"0": value})


def test_ordinary_numbers_pass() -> None:
    Routing.of(top_k=10**9, temperature=1e-8, top_p=1.0, threshold=-1e9, candidates=10**9)
    Routing.of(experts={"a": -1.0, "b": 1000.0, "c": 0.0})
    BuildSettings(rank=256, alpha=1.0, epochs=1.0, steps=None, warmup=0.0, dropout=0.0, seed=-1)
    RunSettings(save_every_s=math.inf)
    ClusterSettings(seed=2**32 - 1)
    assert is_number(3)
    assert not is_number(HUGE)


def test_messages_say_the_bound_and_stay_short() -> None:
    with pytest.raises(UsageError, match=r"x must be above 0 and at most 1e\+30\nfound: -1"):
        check_number("x", -1, above=0.0)
    with pytest.raises(UsageError, match=r"x must be at least -1e\+30 and below 1\nfound: 1"):
        check_number("x", 1, below=1.0)
    with pytest.raises(UsageError, match=r"x must be at least -1e\+30 and at most 1e\+30\nfound: 1e\+31"):
        check_number("x", 1e31)
    with pytest.raises(UsageError, match=r"x must be a whole number\nfound: 2\.0"):
        check_count("x", 2.0)
    with pytest.raises(UsageError, match=r"x must be at most 10{15}\nfound: a whole number of about 400 digits"):
        check_count("x", HUGE)
    with pytest.raises(UsageError, match=r"x must be at least 0 and below 2\*\*63\nfound: -1"):
        check_seed("x", -1)
    assert len(shown("x" * 10_000)) == 80
