"""`vllm bench serve` where vLLM's CPU wheel is installed, whose own command looks for a package of another name."""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
