"""The base classes of metrics, and their inputs."""
