from tensorboardX.proto.summary_pb2 import Summary

class Event:
    step: int
    wall_time: float
    summary: Summary
    def __init__(
        self, *, wall_time: float, step: int = ..., summary: Summary = ..., file_version: str = ...
    ) -> None: ...
    @staticmethod
    def FromString(serialized: bytes) -> Event: ...  # noqa: N802
    def SerializeToString(self) -> bytes: ...  # noqa: N802
