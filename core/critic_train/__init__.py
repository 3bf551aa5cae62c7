"""Train and judge PPO critics offline, from Parquet rollouts.

    from critic_train import FitSettings, fit

    for event in fit(FitSettings(data=["rollouts/"], out="runs/a")):
        print(event)

A name is loaded when it is first used: `import critic_train` imports neither torch nor numpy nor pyarrow.
docs/reference/python.md describes what is here, and what is stable.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from critic_train.check.check import check
    from critic_train.convert.conversion import convert
    from critic_train.data.split import split
    from critic_train.data.writing import ShardWriter, rollout_table
    from critic_train.errors import ConfigError, CriticTrainError, DataError, DivergedError, MachineError, ModelError
    from critic_train.evaluation.evaluate import evaluate
    from critic_train.events import (
        CheckpointSaved,
        EvaluationEnded,
        Event,
        Notice,
        Progress,
        RunEnded,
        RunStarted,
        StepEnded,
        run_to_end,
    )
    from critic_train.export.export import export
    from critic_train.inference import LoadedCritic, load_critic
    from critic_train.predict.predict import predict
    from critic_train.report.page import report
    from critic_train.rollouts import Rollouts
    from critic_train.settings import (
        CheckSettings,
        ConvertSettings,
        EvalSettings,
        ExportSettings,
        FitSettings,
        PredictSettings,
        ReportSettings,
        ShowSettings,
        SplitSettings,
        VerifySettings,
    )
    from critic_train.show.show import show
    from critic_train.stopping import StopRequest
    from critic_train.training.fit import fit
    from critic_train.verify.verify import verify

__version__ = "0.1.0"

__all__ = [
    "CheckSettings",
    "CheckpointSaved",
    "ConfigError",
    "ConvertSettings",
    "CriticTrainError",
    "DataError",
    "DivergedError",
    "EvalSettings",
    "EvaluationEnded",
    "Event",
    "ExportSettings",
    "FitSettings",
    "LoadedCritic",
    "MachineError",
    "ModelError",
    "Notice",
    "PredictSettings",
    "Progress",
    "ReportSettings",
    "Rollouts",
    "RunEnded",
    "RunStarted",
    "ShardWriter",
    "ShowSettings",
    "SplitSettings",
    "StepEnded",
    "StopRequest",
    "VerifySettings",
    "check",
    "convert",
    "evaluate",
    "export",
    "fit",
    "load_critic",
    "predict",
    "report",
    "rollout_table",
    "run_to_end",
    "show",
    "split",
    "verify",
]

_NAMES = {
    "check.check": ["check"],
    "convert.conversion": ["convert"],
    "data.split": ["split"],
    "data.writing": ["ShardWriter", "rollout_table"],
    "errors": ["ConfigError", "CriticTrainError", "DataError", "DivergedError", "MachineError", "ModelError"],
    "evaluation.evaluate": ["evaluate"],
    "events": [
        "CheckpointSaved",
        "EvaluationEnded",
        "Event",
        "Notice",
        "Progress",
        "RunEnded",
        "RunStarted",
        "StepEnded",
        "run_to_end",
    ],
    "export.export": ["export"],
    "inference": ["LoadedCritic", "load_critic"],
    "predict.predict": ["predict"],
    "report.page": ["report"],
    "rollouts": ["Rollouts"],
    "settings": [
        "CheckSettings",
        "ConvertSettings",
        "EvalSettings",
        "ExportSettings",
        "FitSettings",
        "PredictSettings",
        "ReportSettings",
        "ShowSettings",
        "SplitSettings",
        "VerifySettings",
    ],
    "show.show": ["show"],
    "stopping": ["StopRequest"],
    "training.fit": ["fit"],
    "verify.verify": ["verify"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """This module's class. Commands are functions here and folders of the same name.

    Python binds a folder as an attribute of this module when it is first imported, which would hide the function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
