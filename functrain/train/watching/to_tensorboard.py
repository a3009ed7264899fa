"""TensorBoard: training and validation on one chart."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from functrain.train.watching.rows import Row


def tensorboard(folder: str | os.PathLike[str], *, splits: Sequence[str] = ("validation",)) -> TensorBoard:
    """Return a logger that writes TensorBoard events: `tensorboard --logdir FOLDER` shows them.

    A metric such as "validation_loss" is "loss" of a run beside the training's, FOLDER/validation, so both are lines of
    one chart; so is what begins with another of `splits`. Each point has the wall time of its step. Hyper-parameters of
    `record` are a table among the texts and a session of the HPARAMS tab, in which runs are compared, with whether it
    ended well or by an error; where runs lie beside one another, give `--logdir` the folder above. Needs the package
    tensorboard.

    Raises: ImportError, with the command to install it; ValueError for a folder whose name is not UTF-8, which
    TensorBoard does not take.

    >>> hook = ft.train.record("runs/mine", loggers=[ft.train.watching.tensorboard("runs/mine")])  # for ft.fit
    """
    try:
        import tensorboard as _  # noqa: F401
    except ImportError as error:
        raise ImportError("tensorboard is not installed; pip install functrain[watching]") from error
    try:
        os.fspath(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"tensorboard: expected a folder whose name is UTF-8, came {os.fspath(folder)!r}") from None
    return TensorBoard(Path(folder), list(splits))


class TensorBoard:
    """The logger that `tensorboard` returns."""

    def __init__(self, folder: Path, splits: list[str]) -> None:
        self._folder, self._splits = folder, splits
        self._writers: dict[str, Any] = {}
        self._step = 0
        self._status: str | None = None  # at the end of a session, of which hyper-parameters were written

    def begin(self, step: int) -> None:
        self._close_writers()
        self._step = step
        for end in self._folder.glob(f"events.out.tfevents.*{_END}"):
            end.unlink()  # the run goes on, and TensorBoard keeps the first status that it reads
        # those of before have points of later steps, which a new file takes back
        there = [split for split in self._splits if (self._folder / split).is_dir()]
        for split in ["", *there]:
            self._writer(split)

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in row.items():
                split = next((s for s in self._splits if name.startswith(f"{s}_")), "")
                if name not in ("step", "time"):
                    tag = name.removeprefix(f"{split}_") if split else name
                    self._writer(split).add_scalar(tag, value, int(row["step"]), walltime=row.get("time"))
        for writer in self._writers.values():
            writer.flush()

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        plain = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in values.items()}
        table = "".join(f"| {name} | {value} |\n" for name, value in plain.items())
        self._writer("").add_text("hyperparameters", f"| name | value |\n|---|---|\n{table}", self._step)
        from tensorboard.plugins.hparams import summary_v2  # `api`, which offers it, needs tensorflow

        self._writer("").file_writer.add_summary(summary_v2.hparams_pb(plain))
        self._status = "STATUS_SUCCESS"

    def text(self, step: int, name: str, text: str) -> None:
        # indented, so that TensorBoard, which reads Markdown, shows what a model has written as it is
        self._writer("").add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def fail(self, error: BaseException) -> None:
        if self._status is not None:
            self._status = "STATUS_FAILURE"

    def close(self) -> None:
        self._close_writers()
        if self._status is not None:
            self._end_session(self._status)
            self._status = None

    def _end_session(self, status: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
        from torch.utils.tensorboard import SummaryWriter

        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(status), end_time_secs=time.time())
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        # in a file of its own, which a run that goes on takes away
        writer: Any = SummaryWriter(str(self._folder), filename_suffix=_END)
        writer.file_writer.add_summary(Summary(value=[value]))
        writer.close()

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, split: str) -> Any:
        if split not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            _await_another_second(self._folder / split)
            self._writers[split] = SummaryWriter(str(self._folder / split), purge_step=self._step + 1)
        return self._writers[split]


_END = ".end"  # of the name of the file that says how the run ended


def _await_another_second(folder: Path) -> None:
    # TensorBoard reads the files of a folder by name: of two of one second the older may be the last
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)
