"""Every setting of every command, once: its name, type, default, help and place in the help.

The flags, the configuration file, the environment variables, `run.json` and the documentation are all derived from
these dataclasses. Nothing heavy is imported here, so that `--help` stays instant.
"""

from critic_train.settings.compute import Attention, ComputeSettings, Packing, Precision
from critic_train.settings.convert import ConvertSettings, DumpFormat
from critic_train.settings.eval import EvalSettings
from critic_train.settings.fields import Settings, as_dict, flag_of, setting, settings_fields
from critic_train.settings.fit import FitSettings
from critic_train.settings.loss import LossAggMode, LossSettings, OldValues
from critic_train.settings.memory import ActivationCheckpointing, MemorySettings, Offload
from critic_train.settings.model import ModelSettings, Preset
from critic_train.settings.predict import PredictSettings
from critic_train.settings.ranks import RanksSettings
from critic_train.settings.reading import OnBadFile, OnBadRows, ReadingSettings, column_renames
from critic_train.settings.report import ReportSettings
from critic_train.settings.returns import Returns, ReturnsSettings, Truncated
from critic_train.settings.run import RunSettings
from critic_train.settings.split import SplitSettings
from critic_train.settings.tracking import TrackingSettings
from critic_train.settings.training import OnNonFinite, OptimizerKind, Schedule, TrainingSettings
from critic_train.settings.verify import VerifySettings

__all__ = [
    "ActivationCheckpointing",
    "Attention",
    "ComputeSettings",
    "ConvertSettings",
    "DumpFormat",
    "EvalSettings",
    "FitSettings",
    "LossAggMode",
    "LossSettings",
    "MemorySettings",
    "ModelSettings",
    "Offload",
    "OldValues",
    "OnBadFile",
    "OnBadRows",
    "OnNonFinite",
    "OptimizerKind",
    "Packing",
    "Precision",
    "PredictSettings",
    "Preset",
    "RanksSettings",
    "ReadingSettings",
    "ReportSettings",
    "Returns",
    "ReturnsSettings",
    "RunSettings",
    "Schedule",
    "Settings",
    "SplitSettings",
    "TrackingSettings",
    "TrainingSettings",
    "Truncated",
    "VerifySettings",
    "as_dict",
    "column_renames",
    "flag_of",
    "setting",
    "settings_fields",
]
