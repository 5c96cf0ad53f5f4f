"""Run by tools/check_clients.py where there is `lm-eval[api]`: URL, the model's name, and one that it needs not.

Tasks of each kind of request that lm-eval sends, over the server and over transformers on the same checkpoint: texts
are generated, choices and whole texts are scored, which is `echo` with `logprobs`.
"""

import json
import math
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

MODEL_DIR = Path(__file__).resolve().parents[2] / "msi" / "demo_model"
SENTENCES = [
    ("It is a truth universally acknowledged, that a single man in possession of a good", " fortune", " potato"),
    ("She was very much obliged to him for his", " kindness", " trousers"),
    ("Mr. Darcy walked with her into the", " garden", " spectral"),
    ("I hope you will be very", " happy, my dear Jane", " of under but"),
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/sentences.jsonl"}}}}
test_split: test
"""
GENERATION = """
task: generation
output_type: generate_until
doc_to_text: "{{begin}}"
doc_to_target: "{{end}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LIKELIHOOD = """
task: likelihood
output_type: loglikelihood
doc_to_text: "{{begin}}"
doc_to_target: "{{end}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]
"""
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_target: 0
doc_to_choice: "{{[end, other]}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{begin}}{{end}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
SCORES = {"likelihood": "perplexity,none", "choice": "acc,none", "rolling": "word_perplexity,none"}
CLOSE = 1e-3  # relative


def write_tasks(folder):
    lines = (json.dumps({"begin": begin, "end": end, "other": other}) for begin, end, other in SENTENCES)
    (folder / "sentences.jsonl").write_text("".join(line + "\n" for line in lines))
    for number, task in enumerate((GENERATION, LIKELIHOOD, CHOICE, ROLLING)):
        (folder / f"{number}.yaml").write_text(COMMON.format(folder=folder) + task)


def scores(tasks, kind, /, **arguments):
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    found = lm_eval.simple_evaluate(model=kind, model_args=given, tasks=["likelihood", "choice", "rolling"],
                                    task_manager=tasks, bootstrap_iters=0, batch_size=2)  # fmt: skip
    return {task: found["results"][task][name] for task, name in SCORES.items()}


url, name, _ = sys.argv[1:]
folder = Path.cwd()
write_tasks(folder)
tasks = TaskManager(include_path=str(folder), include_defaults=False)
server = {
    "base_url": f"{url}/v1/completions", "model": name, "tokenizer": MODEL_DIR, "tokenizer_backend": "huggingface",
    "num_concurrent": 2, "max_length": 1024, "add_bos_token": True,
}  # fmt: skip
for tokenized in (True, False):
    given = ",".join(f"{key}={value}" for key, value in (server | {"tokenized_requests": tokenized}).items())
    found = lm_eval.simple_evaluate(model="local-completions", model_args=given, tasks=["generation"],
                                    task_manager=tasks, bootstrap_iters=0)  # fmt: skip
    assert found["samples"]["generation"], "nothing was generated"
ours = scores(tasks, "local-completions", **server)
theirs = scores(tasks, "hf", pretrained=MODEL_DIR, dtype="float32", device="cpu", add_bos_token=True)
for task, value in ours.items():
    assert math.isclose(value, theirs[task], rel_tol=CLOSE), f"{task}: {value}; with transformers {theirs[task]}"
told = ", ".join(f"{task} {value:.4f}" for task, value in ours.items())
print(f"generations, prompts as text and as token ids; {told}, as with transformers")
