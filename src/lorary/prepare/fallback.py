"""Evidence on what answers where no expert fits: the mean of all experts or the base; see `lorary.model.fallback`."""

from collections.abc import Mapping

import torch

from lorary.data.schema import Task
from lorary.data.template import make_template
from lorary.display import Display
from lorary.errors import TaskError
from lorary.evaluate.cells import BASE
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.seated_base import SeatedBase, known_base
from lorary.evaluate.tune import masked_views
from lorary.library.opening import template_of
from lorary.library.store import Library
from lorary.model.attach import routing
from lorary.model.base import Base
from lorary.model.fallback import Evidence, load_evidence, save_evidence
from lorary.model.features import last_vectors
from lorary.route.setting import CHAT, UNIFORM, Routing

# Validation rows of each task: one task's say alike, so that more tasks are worth more than more rows.
NUM_ROWS = 4


def measure_fallback(
    base: Base,
    library: Library,
    tasks: Mapping[str, Task],
    *,
    num_rows: int = NUM_ROWS,
    force_base: bool = False,
    display: Display | None = None,
) -> Evidence | None:
    """Compare the mean of all other experts with the base on each task's own rows, and keep that in the library.

    The losses of the right answers are compared, and no answer is generated: an answer that is nearly right counts.
    Rows with options tell of free answers to such prompts, too: it is the loss of the right option that counts.

    Args:
        base: the bare base model.
        library: its experts' tasks are recorded.
        tasks: by name; those of other experts are left out.
        num_rows: validation rows of each task, or training rows where there are none.
        force_base: accept unrelated weights of the same shapes.
        display: where progress is shown.

    Returns:
        What is in the library now: what was there, or was measured; None where nothing can be, because the base has no
        chat template, the experts are in it, or no task of a part of the experts is known.
    """
    name = template_of(library, None)
    if (stored := load_evidence(library)) is not None:
        return stored
    if not base.tokenizer.chat_template or name == CHAT:
        return None
    try:
        experts_of, views = masked_views(library, tasks, num_rows)
    except TaskError:
        return None
    limit = base.most_tokens(1024)
    plain, chat = (make_template(template, base.tokenizer, max_length=limit) for template in (name, CHAT))
    vectors, advantages = [], []
    seated = SeatedBase(known_base(base), library, force_base=force_base)
    with seated, (display or Display()).bar("asking what answers where no expert fits", len(views)) as bar:
        for task, view in views.items():
            model, rows = seated.loaded().model, view.split("test")
            others = [expert for expert in library.names() if expert not in experts_of[task]]
            losses = []
            for setting, template in ((Routing(UNIFORM, allow=others), plain), (Routing(BASE), chat)):
                with routing(model, setting):
                    examples = [template.encode(row.prompt, row.target) for row in rows]
                    losses.append(torch.tensor([loss.mean for loss in answer_losses(model, examples)]))
            with routing(model, Routing(BASE)):
                prompts = [plain.encode_prompt(row.prompt) for row in rows]
                vectors.append(last_vectors(model, prompts))
            advantages.append(losses[1] - losses[0])
            bar.advance(task)
    evidence = Evidence(torch.cat(vectors), torch.cat(advantages))
    save_evidence(library, evidence, {"tasks": sorted(views), "rows": num_rows, "template": name})
    return evidence
