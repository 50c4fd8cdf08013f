"""Reads TensorBoard's event files back, without TensorBoard."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData


def events_of(folder: Path) -> list[Event]:
    """TensorBoard's files of a folder, read record by record: length, checksum, bytes, checksum."""
    events = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return events


def curves_of(events: list[Event]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        for value in event.summary.value:
            if value.HasField("simple_value"):
                name = value.tag.removeprefix("ray/tune/")
                curves.setdefault(name, []).append((event.step, value.simple_value))
    return curves


def last_scalars(events: list[Event]) -> dict[str, float]:
    return {name: curve[-1][1] for name, curve in curves_of(events).items()}


def hparams_of(events: list[Event]) -> dict[str, Any]:
    """The hyper-parameters that TensorBoard's HPARAMS tab shows."""
    found: dict[str, Any] = {}
    for event in events:
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                for name, item in data.session_start_info.hparams.items():
                    found[name] = getattr(item, item.WhichOneof("kind"))
    return found
