"""The engine: a loop, its events and its state."""

from dengine.engine.data.joined import Absent
from dengine.engine.engine import Engine
from dengine.engine.events import EventEnum, Events, EventsList, FilteredEvent, filtered
from dengine.engine.state import State

__all__ = ["Absent", "Engine", "EventEnum", "Events", "EventsList", "FilteredEvent", "State", "filtered"]
