"""Settings of the jobs, one module per kind of job; nothing else reads the environment, but for a signing key."""

from jobs.settings.base import EXIT_BROKEN, EXIT_INTERRUPTED, EXIT_WRONG_JOB, JobSettings, parse
from jobs.settings.dataset import ExportSettings, GenerateSettings, VBenchSettings
from jobs.settings.model import FetchSettings, InspectSettings
from jobs.settings.render import CompactSettings, DemoSettings, RenderSettings, ReportSettings, StatusSettings
from jobs.settings.serve import ServeSettings, webhook_secret
from jobs.settings.training import EncodeSettings, PhaseSettings, TrainSettings, WorldSettings

__all__ = [
    "EXIT_BROKEN",
    "EXIT_INTERRUPTED",
    "EXIT_WRONG_JOB",
    "CompactSettings",
    "DemoSettings",
    "EncodeSettings",
    "ExportSettings",
    "FetchSettings",
    "GenerateSettings",
    "InspectSettings",
    "JobSettings",
    "PhaseSettings",
    "RenderSettings",
    "ReportSettings",
    "ServeSettings",
    "StatusSettings",
    "TrainSettings",
    "VBenchSettings",
    "WorldSettings",
    "parse",
    "webhook_secret",
]
