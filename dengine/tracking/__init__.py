"""Record runs as plain files (configuration, metrics, artifacts), and also in other trackers."""

from dengine.errors import TrackingError
from dengine.tracking.artifacts import Artifact
from dengine.tracking.run import Run
from dengine.tracking.track import Track

__all__ = ["Artifact", "Run", "Track", "TrackingError"]
