"""docs/models.md: what is done with each architecture, found by doing it on a small one.

`./dev models` writes the page; test_models_page.py holds it against the code.
"""

import dataclasses
import re
import sys
import tempfile
from pathlib import Path

import torch
from architectures import MULTIMODAL, TEXT, save_multimodal, text_config
from support import branching_rollouts

from critic_train.layers.prefix_tree import prefix_order
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.model_input import tree_input
from critic_train.model.selfcheck import select_packing
from critic_train.rollouts import Rollouts
from critic_train.settings import FitSettings
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.saving import exported_class, loads_for_token_classification

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
SETTINGS = FitSettings(data=["none"])
IDS_OF_TEXT = 100
FIGURES = r"( by|, where rounding gives) [\d.e+-]+"
"""Of the machine that writes the page."""
INTRODUCTION = """# Models

<!-- Written by ./dev models: a small model of each architecture is read, tried and written. Do not edit. -->

Every decoder that transformers knows can be tried; these are. A *forest* computes shared prefixes once; *rows* are
padded, one rollout each, and right for every decoder. The self-check decides on the data at hand, at the start of each
command, and says why where it is rows. *Narrowed* is a last layer that computes only the positions whose value is read.
*Written as* is the class that a checkpoint names: `AutoModelForTokenClassification`, and so verl, loads those that end
in `ForTokenClassification`; of the others `AutoModel` loads the trunk, and critic-train all of it
([handing over](guides/hand-over.md)). Of a multimodal model the critic is its text trunk.

| model | model_type | packing | why rows | narrowed | written as |
|---|---|---|---|---|---|
"""


def text_rollouts() -> Rollouts:
    """Rollouts without ids that multimodal models put features in place of."""
    rollouts = branching_rollouts()
    return dataclasses.replace(rollouts, input_ids=rollouts.input_ids % IDS_OF_TEXT)


def row(name: str) -> str:
    """The line of an entry of TEXT or MULTIMODAL."""
    if name in TEXT:
        critic, model_type = build_critic(text_config(name), seed=0), TEXT[name][0]
    else:
        with tempfile.TemporaryDirectory() as folder:
            critic = load_critic(read_model(save_multimodal(name, Path(folder))))
        model_type, name = MULTIMODAL[name][1], f"{name} (multimodal)"
    rollouts = text_rollouts()
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=4096)
    written = exported_class(critic)
    token_class = loads_for_token_classification(critic)
    try:
        choice, _ = select_packing(critic.train(), rollouts, SETTINGS.compute, compute)
    except Exception as error:
        return f"| {name} | `{model_type}` | refused | {str(error).splitlines()[0]} | | |"
    packing = "forest" if choice.forest else "rows"
    narrowed = "yes" if choice.forest and is_narrowed(critic, rollouts) else "no"
    reason = re.sub(FIGURES, "", choice.reason.split(": ", 1)[-1])
    return f"| {name} | `{model_type}` | {packing} | {reason} | {narrowed} | `{written}`{'' if token_class else ' *'} |"


@torch.no_grad()
def is_narrowed(critic: Critic, rollouts: Rollouts) -> bool:
    """Whether the last layer gives fewer positions than the layout has."""
    batch = tree_input(rollouts, prefix_order(rollouts), torch.device("cpu"))
    states = critic.trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state
    return bool(states.flatten(0, 1).shape[0] < batch.computed_tokens)


def page(names: list[str] | None = None) -> str:
    """All of the page, or the part about some models."""
    lines = [row(name) for name in (names or [*TEXT, *MULTIMODAL])]
    return INTRODUCTION + "\n".join(lines) + "\n\n\\* transformers has no token-classification class for it.\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.exit(0)
