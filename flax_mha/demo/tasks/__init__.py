"""The tasks, by the name that `[task]` gives."""

from flax_mha.demo.tasks.contract import Task
from flax_mha.demo.tasks.dates import DatesTask
from flax_mha.demo.tasks.digits import DigitsTask
from flax_mha.demo.tasks.language import Language

TASKS: dict[str, type[Task]] = {"language": Language, "digits": DigitsTask, "dates": DatesTask}
