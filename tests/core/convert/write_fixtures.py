"""Writes the files in `fixtures/` with the frameworks' own code.

    pip install --no-deps verl==0.9.1 openrlhf==0.11.2 pylatexenc
    pip install tensordict ray omegaconf codetiming torchdata datasets cachetools fastapi pandas
    python tests/core/convert/write_fixtures.py tests/core/convert/fixtures

None of it needs a GPU. The tests call the same functions afresh where the packages are there.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import dumps

METHOD = "VERL_DATAPROTO_SERIALIZATION_METHOD"


def verl_data_proto(path: Path, *, numpy: bool = False) -> None:
    """DataProto.save_to_disk, in either of its two forms."""
    from verl import DataProto

    of = dumps.rollouts()
    proto = DataProto.from_dict(
        tensors=dumps.verl_batch(of), non_tensors=dumps.verl_others(of), meta_info={"global_steps": dumps.STEP}
    )
    os.environ[METHOD] = "numpy" if numpy else ""
    proto.save_to_disk(str(path))
    del os.environ[METHOD]


def verl_jagged(path: Path) -> None:
    """A DataProto of nested tensors, without padding."""
    from tensordict import TensorDict
    from verl import DataProto

    of = dumps.rollouts()

    def nested(rows: list[list[float]], kind: torch.dtype) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(row, dtype=kind) for row in rows], layout=torch.jagged)

    batch = {
        "prompts": nested([r.ids[: r.prompt] for r in of], torch.int64),
        "responses": nested([r.response("ids") for r in of], torch.int64),
        "response_mask": nested([r.response("mask") for r in of], torch.int64),
        "values": nested([r.response("values") for r in of], torch.float32),
        "returns": nested([r.response("returns") for r in of], torch.float32),
    }
    others = {name: np.asarray(entries) for name, entries in dumps.verl_others(of).items()}
    DataProto(batch=TensorDict(batch, batch_size=len(of)), non_tensor_batch=others).save_to_disk(str(path))


def verl_lines(folder: Path) -> None:
    """trainer.rollout_data_dir: RayPPOTrainer._write_generations."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    of = dumps.rollouts()
    questions = [f"say {r.uid}" for r in of]
    answers = [f"{r.uid} is said , {place} times" for place, r in enumerate(of)]
    extra = {"acc": [r.reward > 0.5 for r in of], "request_id": [f"id-{place}" for place in range(len(of))]}
    scores = [r.reward for r in of]
    RayPPOTrainer._write_generations(questions, answers, [None] * len(of), scores, extra, str(folder), dumps.STEP)


def openrlhf_experiences(path: Path) -> None:
    """Two Experience batches, made by OpenRLHF's own batching, kept by the snippet of docs/guides/convert.md."""
    from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch, split_experience_batch

    of = dumps.rollouts()
    single = [item for r in of for item in split_experience_batch(Experience(**dumps.openrlhf_fields([r])))]
    snippet()([make_experience_batch(single[:5]), make_experience_batch(single[5:])], str(path), dumps.STEP)


def snippet():
    """The function `dump_experiences` of docs/guides/convert.md."""
    page = Path(__file__).parents[3] / "docs" / "convert.md"
    block = next(b for b in page.read_text().split("```python\n")[1:] if "def dump_experiences" in b).split("```")[0]
    names: dict[str, object] = {}
    exec(block, names)
    return names["dump_experiences"]


def main(folder: Path) -> None:
    """Write all of them."""
    folder.mkdir(exist_ok=True)
    verl_data_proto(folder / "verl_dataproto.pkl")
    verl_data_proto(folder / "verl_dataproto_numpy.pkl", numpy=True)
    verl_jagged(folder / "verl_dataproto_jagged.pkl")
    verl_lines(folder / "verl_rollout_data_dir")
    openrlhf_experiences(folder / "openrlhf_experiences.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
