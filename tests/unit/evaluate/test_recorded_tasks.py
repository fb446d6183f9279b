"""Which tasks an adapter counts as trained on."""

from lorary.evaluate.recorded_tasks import experts_by_task, mapped_by_name, tasks_of


def described(**tasks: list[str]) -> list[dict[str, object]]:
    return [{"name": name, "tasks": recorded} for name, recorded in tasks.items()]


def test_the_expert_of_fewest_tasks_is_that_of_a_task() -> None:
    assert experts_by_task(described(all=["a", "b"], one=["a"])) == {"a": "one", "b": "all"}


def test_a_name_counts_where_no_task_is_recorded_and_after_those_that_are() -> None:
    rows = described(a=[], b=["a", "c", "d"], c=["b"])
    assert experts_by_task(rows)["a"] == "b"
    assert experts_by_task(described(a=[]))["a"] == "a"
    assert "c" not in experts_by_task(described(c=["b"]))
    assert [tasks_of(row) for row in rows] == [["a"], ["a", "c", "d"], ["b"]]


def test_only_names_that_are_tasks_at_hand_are_said() -> None:
    assert mapped_by_name(described(a=[], b=[], c=["a"]), {"a", "c"}) == ["a"]
