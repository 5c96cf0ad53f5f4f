"""A real gateway in front of a small instance, for tests of the edge."""

from __future__ import annotations

import contextlib
import json
import shutil

from msi import Engine
from msi.server.gateway import Gateway

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n<{{ message['role'] }}>{{ message['content'] | trim }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(model, folder, template=TEMPLATE):
    """A copy of a model directory that has a chat template."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    values = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@contextlib.asynccontextmanager
async def gateway(model, engine=None, kind=Gateway, **options):
    """(engine, url); `engine`: more options for it."""
    fixed = {"model": model, "transport": "inproc", "served_model_name": "tiny", "micro_batches": 1}
    async with Engine.local(**fixed | (engine or {})) as engine:
        served = kind(engine, host="127.0.0.1", port=0, **options)
        try:
            yield engine, await served.start()
        finally:
            await served.close()
