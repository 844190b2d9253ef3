"""The engine: a loop, its events and its state."""

from dengine.engine.data import Absent
from dengine.engine.events import EventEnum, Events, EventsList, FilteredEvent, filtered
from dengine.engine.loop import Engine
from dengine.engine.state import State

__all__ = ["Absent", "Engine", "EventEnum", "Events", "EventsList", "FilteredEvent", "State", "filtered"]
