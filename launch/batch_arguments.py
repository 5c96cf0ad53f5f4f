"""The command line of msi-launch run-batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msi.errors import ConfigError
from msi.net.rdma.options import GROUP as RDMA
from msi.net.secret import Secret, find_secret
from msi.options import DIAGNOSIS, PARAMETERS, InstanceOptions, with_plan
from msi.settings import LIMITS, MODEL_AND_WORKERS

from .arguments import LOG_LEVELS, add_parameters
from .command_line import CommandLine, file_to_read, file_to_write, integer, one_of
from .vllm_flags import add_foreign

DESCRIPTION = """Answer a file of requests in OpenAI's batch format, one JSON object a line, by an instance of its own
or one that runs. A run that was cut short goes on where it was: what the output answers is not computed again."""
MAX_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class BatchArguments:
    """Attributes:
    options: None for an instance that runs at `coordinator`.
    at_once: choices with the engine; the others wait in the file.
    """

    options: InstanceOptions | None
    coordinator: str
    secret: Secret | None
    input_file: Path
    output_file: Path
    chat_template: Path | None
    at_once: int
    log_level: str
    log_json: bool

    @property
    def log_flags(self) -> tuple[str, ...]:
        """For processes that this one starts."""
        return ("--log-level", self.log_level, *(("--log-json",) if self.log_json else ()))


def parse(argv: list[str]) -> BatchArguments:
    """Raises ConfigError. --help and --version print, and end the process."""
    parser = CommandLine(
        "msi-launch run-batch", DESCRIPTION, usage="msi-launch run-batch -i IN -o OUT [MODEL] [options]"
    )
    add = parser.add_argument_group("the batch").add_argument
    add("-i", "--input-file", type=file_to_read, metavar="FILE", help="requests: custom_id, method, url, body")
    add("-o", "--output-file", type=file_to_write, metavar="FILE", help="answers, in the order in which they come")
    add("--at-once", type=integer(1, MAX_AT_ONCE), default=256, metavar="N",
        help="choices that the instance has at a time; 256")  # fmt: skip
    add("--chat-template", type=file_to_read, metavar="FILE", help="Jinja file in place of the model's chat template")
    add(
        "--coordinator",
        default="",
        metavar="ADDRESS",
        help="tcp://HOST:PORT of an instance that runs, in place of MODEL",
    )
    add("--secret-file", type=Path, metavar="FILE", help="that instance's secret; or MSI_SECRET")
    for heading in (MODEL_AND_WORKERS, LIMITS, RDMA):
        add_parameters(parser.add_argument_group(heading), heading)
    group = parser.add_argument_group(DIAGNOSIS)
    group.add_argument("--log-level", type=one_of(*LOG_LEVELS), default="info", metavar="L",
                       help="debug, info, warning or error")  # fmt: skip
    group.add_argument("--log-json", action="store_true", help="the log as JSON, one object a line")
    add_parameters(group, DIAGNOSIS)
    add_foreign(parser)
    values = parser.parse_args(argv)
    for flag, given in (("-i", values.input_file), ("-o", values.output_file)):
        if given is None:
            raise ConfigError(f"{flag} is missing: give -i FILE with requests and -o FILE for their answers")
    if values.output_file.exists() and values.output_file.samefile(values.input_file):
        raise ConfigError(f"-i and -o are both {values.output_file}; give the answers a file of their own")
    told = {one.name: value for one in PARAMETERS if (value := getattr(values, one.name)) is not None}
    if values.coordinator and told:
        raise ConfigError(
            f"`{next(iter(told))}` is for an instance of this command's own; leave it or `coordinator` out"
        )
    return BatchArguments(
        options=None if values.coordinator else InstanceOptions.of(**with_plan(told)),
        coordinator=values.coordinator,
        secret=find_secret(values.secret_file) if values.coordinator else None,
        input_file=values.input_file,
        output_file=values.output_file,
        chat_template=values.chat_template,
        at_once=values.at_once,
        log_level=values.log_level,
        log_json=values.log_json,
    )
