"""`critic-train predict`, from top to bottom: read, check, predict, write."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from critic_train.data.bad_files import BadFiles
from critic_train.data.copying import CopyStoppedError, places
from critic_train.data.output import OutputDirectory
from critic_train.data.shards import Shard, find_shards, fingerprint
from critic_train.events import Event, Notice, RunEnded
from critic_train.model.compute import Compute, resolve_device
from critic_train.model.loading import ModelSource
from critic_train.predicting.first_pass import critic_source
from critic_train.predicting.job import Job, StoppedError
from critic_train.predicting.parts import device_of, part_of_this_process
from critic_train.run.model_digest import model_digest
from critic_train.settings import PredictSettings, as_dict
from critic_train.stopping import StopRequest
from critic_train.versions import versions

NOT_PART_OF_THE_RESULT = ("to", "part")


def predict(settings: PredictSettings, stop: StopRequest) -> Iterator[Event]:
    """Write shards again with a critic's values, and returns and advantages made of them. Streams.

    All rows are read and checked before the model runs. Values are kept on the disk as they are computed, so a job that
    was stopped or killed goes on where it was; a file that stands is done.

    Args:
        settings: what to predict, and what to write.
        stop: looked at between micro-batches and pieces of files.

    Yields:
        Progress and notices; RunEnded last.

    Raises:
        CriticTrainError: a fault that the user can mend.
    """
    part = part_of_this_process(settings)
    compute = Compute(
        device=resolve_device(device_of(settings.device)), precision=settings.precision, max_tokens=settings.max_tokens
    )
    bad_files = BadFiles()
    shards = find_shards(settings.data, bad_files)
    target = places(shards, settings.data, Path(settings.to or ""))
    source = critic_source(Path(settings.model or ""))
    with OutputDirectory(Path(settings.to or ""), "predict", target, part) as output:
        for message in output.compare(_record(settings, shards, source)):
            yield Notice(message=message, level="warning")
        mine = shards[part[0] - 1 :: part[1]]
        job = Job(
            settings=settings,
            source=source,
            compute=compute,
            output=output,
            places=target,
            bad_files=bad_files,
            stop=stop,
        )
        if all(output.is_written(shard.name) for shard in mine):
            output.clear()
            yield RunEnded(status="already finished", result=job.result("already finished", mine, part))
            return
        try:
            yield from job.run(mine)
        except (StoppedError, CopyStoppedError):
            yield RunEnded(
                status="interrupted",
                result=job.result("interrupted", mine, part),
                signal_number=stop.signal_number,
            )
            return
        output.clear()
        yield RunEnded(status="finished", result=job.result("finished", mine, part))


def _record(settings: PredictSettings, shards: list[Shard], source: ModelSource) -> dict[str, Any]:
    """What the output depends on, for the comparison with how it was begun."""
    told = {name: value for name, value in as_dict(settings).items() if name not in NOT_PART_OF_THE_RESULT}
    return {
        "settings": told,
        "data": fingerprint(shards),
        "model": model_digest(source.path),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
