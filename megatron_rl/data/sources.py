"""Where prompts and examples come from, and how far we have read.

`Rows` are the raw records of a .jsonl file, a .parquet file or a reasoning-gym task. An encoder makes a `Prompt` (or a
prompt and its response) of one row. A `Source` draws rows in an order that depends on (seed, epoch) alone, so the
number of rows drawn is the whole of its state.
"""

import difflib
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from reprlib import repr as short
from typing import Any, Generic, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_rl.data.chat import ChatMode, TruncationSide, encode_prompt, fit_prompt
from megatron_rl.data.media import refuse_media
from megatron_rl.data.templates import fill_template
from megatron_rl.types import Prompt

Row = Mapping[str, Any]
T_co = TypeVar("T_co", covariant=True)

TASK_PREFIX = "reasoning-gym:"
# The order of an epoch is a list of all questions.
MOST_QUESTIONS = 10**7
# In reasoning-gym 0.1.25 these draw from Python's hash seed or the global generator, not from their own seed.
UNREPEATABLE_TASKS = frozenset(
    ["isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"]
)


class Rows(ABC):
    """Records by number. `digest` changes when their content does."""

    name: str
    digest: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Row: ...

    @abstractmethod
    def first_without(self, key: str) -> int | None:
        """The number of the first row in which `key` is missing or null."""

    def where(self, index: int) -> str:
        """Where a person finds this row."""
        return f"{self.name} row {index}"


class JsonlRows(Rows):
    """One JSON object a line; blank lines do not count."""

    def __init__(self, path: Path) -> None:
        self.name, self.digest = str(path), _file_digest(path)
        self._rows: list[Row] = []
        self._lines: list[int] = []
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self._rows.append(_parse_object(line, f"{path} line {number}"))
                    self._lines.append(number)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def first_without(self, key: str) -> int | None:
        return next((index for index, row in enumerate(self._rows) if row.get(key) is None), None)

    def where(self, index: int) -> str:
        return f"{self.name} line {self._lines[index]}"


class ParquetRows(Rows):
    """A parquet file, mapped into memory and made into Python objects row by row; nothing is cached on disk."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.name, self.digest = str(path), _file_digest(path)
        try:
            self._table = pyarrow.parquet.read_table(path, memory_map=True)
            self._columns: list[str] = self._table.column_names
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Row:
        try:
            return self._table.slice(index, 1).to_pylist()[0]
        except (ArithmeticError, LookupError) as error:  # a date after the year 9999, a time zone that is none
            raise ValueError(f"it cannot be read: {error}") from error

    def first_without(self, key: str) -> int | None:
        if key not in self._columns:
            return 0
        column = self._table.column(key)
        return column.is_null().index(True).as_py() if column.null_count else None


class TaskRows(Rows):
    """Questions of a reasoning-gym task, made when they are asked for.

    `entry` is the whole record that the task's own scorer wants back.
    """

    def __init__(self, task: str, *, size: int, seed: int, options: Mapping[str, Any]) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ValueError(f"{TASK_PREFIX}{task} needs reasoning-gym: pip install 'megatron_rl[tasks]'") from error
        _check_task(task, list(reasoning_gym.factory.DATASETS))
        self.name, self.task = f"{TASK_PREFIX}{task}", task
        try:
            self._dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
            spec = json.dumps([task, size, seed, dict(options), metadata.version("reasoning-gym")], sort_keys=True)
        except Exception as error:  # the task's own code, which trips over what it does not expect
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.name} does not take size={size} and options {dict(options)}: {reason}") from error
        self.digest = hashlib.sha256(spec.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        try:
            entry = self._dataset[index]
        except Exception as error:  # the same
            raise ValueError(f"the task fails with {type(error).__name__}: {error}; correct its options") from error
        question, answer = entry["question"], entry["answer"]
        return {"prompt": question, "question": question, "answer": answer, "dataset": self.task, "entry": entry}

    def first_without(self, key: str) -> int | None:
        return 0 if self[0].get(key) is None else None


def load_rows(
    source: str | Path, *, size: int | None = None, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Rows:
    """The rows of a .jsonl or .parquet file, or of a task such as `reasoning-gym:chain_sum`.

    `size`, `seed` and `options` describe a task: how many questions, which ones, and the task's own settings.
    """
    name = str(source)
    if name.startswith(TASK_PREFIX):
        if type(size) is not int or not 1 <= size <= MOST_QUESTIONS:
            raise ValueError(
                f"{name} has no end of its own: set data.task.size to the number of questions, not {size!r}; "
                f"{MOST_QUESTIONS} are the most"
            )
        if type(seed) is not int:
            raise ValueError(f"data.task.seed={seed!r} must be a whole number")
        return TaskRows(name.removeprefix(TASK_PREFIX), size=size, seed=seed, options=options or {})
    if size is not None or options:
        raise ValueError(f"size and options are for {TASK_PREFIX}... tasks, and {name!r} is a file: remove them")
    readers: dict[str, type[JsonlRows] | type[ParquetRows]] = {".jsonl": JsonlRows, ".parquet": ParquetRows}
    path = Path(source)
    if path.suffix not in readers:
        raise ValueError(f"cannot read {name!r}: name a .jsonl file, a .parquet file or {TASK_PREFIX}<task>")
    try:
        if not path.is_file():
            raise ValueError(f"there is no file {name!r} (seen from {Path.cwd()})")
        return readers[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{name!r} cannot be read: {error.strerror or error}") from error


class Encoder(Protocol[T_co]):
    """Makes one item of a row. `keys` are the fields that every row must have."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    def __call__(self, index: int, row: Row) -> T_co: ...


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Row -> Prompt. `text` stays whole where the token ids had to be cut; `template` is one's text."""

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    prompt_key: str = "prompt"
    template: str | None = None
    chat: ChatMode = "auto"
    truncation_side: TruncationSide = "error"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.prompt_key,)

    def __call__(self, index: int, row: Row) -> Prompt:
        refuse_media(row)
        text, token_ids = self.encode(row[self.prompt_key])
        token_ids = fit_prompt(token_ids, self.max_prompt_tokens, self.truncation_side)
        return Prompt(index=index, text=text, token_ids=token_ids, row=row)

    def encode(self, value: Any) -> tuple[str, tuple[int, ...]]:
        """The text and all token ids of what a row holds as its prompt: the template first, then the chat template."""
        return encode_prompt(self.tokenizer, self.filled(value), chat=self.chat)

    def filled(self, value: Any) -> Any:
        """The template with the question in it, where there is one."""
        return value if self.template is None else fill_template(self.template, value)


@dataclass(frozen=True, kw_only=True)
class ExampleEncoder:
    """Row -> the prompt and the response to learn."""

    prompt: PromptEncoder
    response_key: str = "response"

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.prompt.keys, self.response_key)

    def __call__(self, index: int, row: Row) -> tuple[Prompt, str]:
        response = row[self.response_key]
        if not isinstance(response, str):
            raise ValueError(f"{self.response_key!r} must be text, not {short(response)}")
        return self.prompt(index, row), response


class Source(Generic[T_co]):
    """Encoded rows without end, reshuffled every epoch, with a cursor that can be saved."""

    def __init__(self, rows: Rows, encode: Encoder[T_co], *, seed: int) -> None:
        if not len(rows):
            raise ValueError(f"{rows.name} holds no rows")
        for key in encode.keys:
            if (index := rows.first_without(key)) is not None:
                raise ValueError(
                    f"{rows.where(index)} has no {key!r}; its fields are {sorted(rows[index])}. Set the key's name to "
                    "one that every row has"
                )
        self._rows, self._encode, self._seed = rows, encode, seed
        self._drawn = 0
        self._epoch, self._order = 0, permutation(len(rows), seed, 0)

    def __len__(self) -> int:
        return len(self._rows)

    def next(self, n: int) -> list[T_co]:
        """The next n items. A draw may run over the end of an epoch."""
        items = [self._item(self._index(self._drawn + k)) for k in range(n)]
        self._drawn += n
        return items

    def at(self, index: int) -> T_co:
        """The item of a row; the cursor stays."""
        return self._item(index)

    def all(self) -> list[T_co]:
        """Every item once, in the order of the rows; the cursor stays."""
        return [self._item(index) for index in range(len(self))]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved source stopped; refused if the order or the rows are others now."""
        for key, now in self._identity().items():
            if state[key] != now:
                raise ValueError(
                    f"the saved run read {key}={state[key]!r} and {self._rows.name} has {key}={now!r}, so it cannot "
                    "go on exactly: restore the same data and seed, or start a new run"
                )
        self._drawn = state["drawn"]

    def _identity(self) -> dict[str, Any]:
        return {"seed": self._seed, "num_rows": len(self), "digest": self._rows.digest}

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self), self._seed, epoch)
        return self._order[offset]

    def _item(self, index: int) -> T_co:
        try:
            return self._encode(index, self._rows[index])
        except ValueError as error:
            raise ValueError(f"{self._rows.where(index)}: {error}") from error


PromptSource = Source[Prompt]
ExampleSource = Source[tuple[Prompt, str]]


def permutation(n: int, *key: int) -> list[int]:
    """An order of n things that the key alone decides.

    Python promises to keep `random()` over its versions, and does not promise `shuffle`.
    """
    generator = random.Random("/".join(map(str, key)))
    keys = [generator.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


def _parse_object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} must hold a JSON object, one record a line, not {type(row).__name__}")
    return row


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_task(task: str, known: list[str]) -> None:
    if task not in known:
        nearest = ", ".join(difflib.get_close_matches(task, known, n=3)) or "see reasoning-gym's gallery"
        raise ValueError(f"reasoning-gym has no task {task!r}; nearest: {nearest}")
    if task in UNREPEATABLE_TASKS:
        raise ValueError(
            f"reasoning-gym's {task!r} asks other questions in every process, so ranks and resumed runs would "
            "disagree: choose another task, or write its questions to a .jsonl file once and read that"
        )
