"""Reads TensorBoard event files as TensorBoard does: a restart hides what it writes again."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog


def scalars(folder: Path, name: str) -> dict[int, float]:
    """Step -> value of one curve."""
    curve: dict[int, float] = {}
    for file in sorted(folder.glob("events.*")):
        for event in _events(file.read_bytes()):
            if event.session_log.status == SessionLog.START:
                curve = {step: value for step, value in curve.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == name:
                    curve[event.step] = value.simple_value
    return curve


def _events(data: bytes):
    """Records of length (8 bytes), its checksum (4), the event, its checksum (4)."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
