"""What draws a run's figures: TensorBoard, always, and Weights & Biases, where the config names a project."""

import hashlib
import html
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Backend(Protocol):
    """A place for the figures of a run. Steps never go back; what is given for one step adds up."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """The distribution of `values`, which are finite and at least one."""

    def text(self, step: int, name: str, markdown: str) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None:
        """The PNG file at `path`, as it is now."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `directory`. What they hold of `first_step` and later steps is dropped by their readers."""

    def __init__(self, directory: Path, first_step: int) -> None:
        # Imported late: it costs a second, on one rank only.
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(directory), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        import numpy as np

        self._events.add_histogram(name, np.asarray(values, dtype=np.float64), step)

    def text(self, step: int, name: str, markdown: str) -> None:
        self._events.add_text(name, markdown, step)

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._events.add_image(name, np.asarray(image.convert("RGBA")), step, dataformats="HWC")

    def close(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """One W&B run per run directory: a resumed run goes on in it. Its files are in `<run_dir>/wandb`.

    W&B takes no step back: of one that an earlier process sent and this one repeats, it keeps the first figures.
    """

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any], first_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"log.wandb={project!r} needs wandb: pip install wandb, or remove log.wandb") from error

        place = run_dir.resolve()
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            dir=str(run_dir),
            name=place.name,
            id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
            resume="allow",
            config=dict(config),
        )
        if self._run.starting_step > first_step:
            log.warning(
                "W&B run %s already has the steps before %d and keeps them; this process starts at step %d",
                self._run.id,
                self._run.starting_step,
                first_step,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        self._run.log({name: self._wandb.Histogram(values)}, step=step)

    def text(self, step: int, name: str, markdown: str) -> None:
        # Escaped: a model wrote it.
        page = f'<pre style="white-space: pre-wrap">{html.escape(markdown)}</pre>'
        self._run.log({name: self._wandb.Html(page)}, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()
