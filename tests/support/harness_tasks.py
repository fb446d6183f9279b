"""Tasks for lm-evaluation-harness in the forms of ARC-easy, PIQA, BoolQ and others, over rows of our own making."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ARC = [
    {
        "question": question,
        "choices": {"text": texts, "label": list("ABCD")[: len(texts)]},
        "answerKey": key,
    }
    for question, texts, key in (
        ("Which of these melts in a warm hand?", ["a brick", "an ice cube", "a spoon", "a candle stick"], "B"),
        ("What does a plant take in through its roots?", ["water", "sunlight", "wind", "birds"], "A"),
        ("Which season follows spring?", ["winter", "autumn", "summer"], "C"),
    )
]
PIQA = [
    {"goal": goal, "sol1": one, "sol2": other, "label": label}
    for goal, one, other, label in (
        ("To keep soup warm,", "put a lid on the pot.", "put the pot in the fridge.", 0),
        ("dry wet shoes", "fill them with water", "fill them with newspaper", 1),
        ("To open a stuck jar", "tap its lid against the table.", "tap its lid against the table and pray.", 0),
    )
]
BOOLQ = [
    {"passage": passage, "question": question, "label": label}
    for passage, question, label in (
        ("The ferry runs from May to October. In winter it lies in the harbour.", "does the ferry run in july", 1),
        ("A square has four sides of one length.  ", "does a square have five sides", 0),
        ("Bats hang upside down while they sleep, and they hunt at night.", "do bats sleep standing", 0),
    )
]
TEXTS = [{"text": f"The colour of month {number} is blue, and the sky follows. " * number} for number in (1, 3, 9)]

FORMS: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]] = {
    "tiny_arc": (
        r"""
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
        ARC,
    ),
    "tiny_piqa": (
        r"""
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
        PIQA,
    ),
    "tiny_boolq": (
        r"""
output_type: multiple_choice
doc_to_text: "{{passage}}\nQuestion: {{question}}?\nAnswer:"
doc_to_target: label
doc_to_choice: ["no", "yes"]
fewshot_split: test
num_fewshot: 1
metric_list: [{metric: acc}]
""",
        BOOLQ,
    ),
    "tiny_texts": (
        r"""
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
        TEXTS,
    ),
    "tiny_answers": (
        r"""
output_type: generate_until
doc_to_text: "{{goal}} Then"
doc_to_target: "{{sol1}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
        PIQA,
    ),
}


def write_forms(folder: Path, forms: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]] = FORMS) -> Path:
    """A folder of tasks as `include_path` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (form, rows) in forms.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + form.lstrip())
    (folder / "tiny_group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_arc, tiny_piqa]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
        if {"tiny_arc", "tiny_piqa"} <= set(forms)
        else ""
    )
    return folder
