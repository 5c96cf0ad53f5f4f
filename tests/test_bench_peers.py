"""What `tools/bench_peers.py` makes of when tokens came, and whom it leaves out."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tools import bench_peers
from tools.peers import load, servers
from tools.peers.servers import PEERS, Setting


def setting(model, **others):
    return Setting(
        **{"model": model, "num_threads": 2, "quantization": "none", "max_num_seqs": 8, "context": 64, **others}
    )


def test_decoding_is_counted_while_all_decode_and_pieces_may_hold_several_tokens():
    streams = [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]
    found = load.figures_of_batch(0.0, streams, 4)
    assert found == {"decode_tokens_per_s": 4 / 2, "end_to_end_tokens_per_s": 8 / 5, "ttft_s": 1.5}
    assert load.figures_of_batch(0.0, [[1.0, 2.0], [1.0, 2.0]], 4)["decode_tokens_per_s"] == 4.0
    assert "decode_tokens_per_s" not in load.figures_of_batch(0.0, [[1.0]], 4), "they never did"


def test_prompts_are_others_for_every_seed_and_the_same_for_every_server():
    assert load.prompts(1, 2, 5, 100) == load.prompts(1, 2, 5, 100)
    assert load.prompts(1, 2, 5, 100) != load.prompts(2, 2, 5, 100)
    assert all(3 <= token < 100 for prompt in load.prompts(3, 4, 50, 100) for token in prompt)


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "better"),
    [
        ("decode_tokens_per_s, 8", [2.0, 4.0, 9.0], [1.0, 2.0, 3.0], 2.0),
        ("ttft_s, 8", [1.0, 2.0], [2.0, 4.0], 2.0),
        ("ttft_s of 1000", [2.0], [1.0], 0.5),
        ("poisson_requests_per_s", [3.0], [2.0], 1.5),
        ("memory_mb", [200.0], [100.0], 0.5),
    ],
)
def test_a_ratio_above_one_is_better(name, ours, theirs, better):
    assert bench_peers.ratio(name, ours, theirs) == better


def test_the_table_has_a_row_for_each_figure_and_a_column_for_each_server():
    figures = {"start_s": {"msi": [4.0, 6.0, 5.0], "vllm": [10.0, 20.0, 15.0]}, "ttft_s, 1": {"vllm": [1.0]}}
    made = bench_peers.table(figures, ["msi", "vllm"])
    assert [list(column.cells) for column in made.columns] == [["start_s", "ttft_s, 1"], ["5", ""], ["15  (3.00)", "1"]]


def test_a_picture_is_drawn_and_drawn_again_of_what_was_kept(tmp_path, monkeypatch):
    figures = {f"figure {at}": {"msi": [1.0], "vllm": [2.0]} for at in range(4)}
    about = {"model": "mid", "threads": 2, "processor": "any"}
    bench_peers.draw(figures, ["msi", "vllm"], about, tmp_path / "peers.svg")
    drawn = (tmp_path / "peers.svg").read_text()
    assert drawn.count('<g id="axes_') == 4, "and no panel without a figure"
    kept, again = tmp_path / "peers.json", tmp_path / "again.svg"
    kept.write_text(json.dumps({**about, "weights": {"msi": "bfloat16", "vllm": "bfloat16"}, "rounds_of": figures}))
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--redraw", str(kept), "--figure", str(again)])
    asyncio.run(bench_peers.main())
    assert again.read_text().count('<g id="axes_') == 4


def test_without_a_model_a_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_peers.py"])
    with pytest.raises(SystemExit, match="2"):
        bench_peers.parse()
    assert "model is missing" in capsys.readouterr().err


def test_of_other_families_no_gguf_file_is_written(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(ValueError, match="a GGUF file is written of mixtral alone, not of qwen3_moe"):
        PEERS["llama.cpp"].command(Path(sys.executable), setting(tmp_path), 1)


async def test_who_cannot_serve_is_left_out_with_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(servers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(bench_peers, "python_of", lambda name: Path(sys.executable))
    broken = [sys.executable, "-c", "raise SystemExit('no such model')"]
    monkeypatch.setattr(servers, "PEERS", {"msi": servers.Peer((), (), lambda *_: broken, {})})
    assert await bench_peers.start_all(["msi"], setting(tmp_path)) == []
    assert f"msi is left out: it ended; what it said is in {tmp_path}/msi.log" in capsys.readouterr().err
    assert (tmp_path / "msi.log").read_text() == "no such model\n"


SERVER = """
import json, sys
from aiohttp import web

async def complete(request):
    asked = await request.json()
    assert asked["ignore_eos"] and asked["stream"] and asked["temperature"] == 0
    if len(asked["prompt"]) > 5:
        return web.Response(status=400, text="too long")
    response = web.StreamResponse()
    await response.prepare(request)
    for number in range(asked["max_tokens"]):
        await response.write(b'data: {"choices": [{"text": "x"}]}\\n\\n')
    await response.write(b"data: [DONE]\\n\\n")
    return response

app = web.Application()
app.router.add_post("/v1/completions", complete)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


async def test_a_server_is_measured_in_turns_and_one_that_refuses_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(servers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(bench_peers, "python_of", lambda name: Path(sys.executable))
    command = lambda python, told, port: [str(python), "-c", SERVER, str(port)]  # noqa: E731
    monkeypatch.setattr(servers, "PEERS", {"msi": servers.Peer((), (), command, {})})
    running = await bench_peers.start_all(["msi"], setting(tmp_path))
    assert [server.name for server in running] == ["msi"]
    assert running[0].start_s > 0
    monkeypatch.setattr(
        sys, "argv",
        ["bench_peers", "any", "--batch", "1", "3", "--input-len", "4", "--output-len", "3", "--long", "0",
         "--requests", "3", "--rate", "1000", "--rounds", "2"],
    )  # fmt: skip
    arguments = bench_peers.parse()
    try:
        figures = await bench_peers.in_turns(running, 100, arguments)
        always = {f"{name}, {batch}" for batch in (1, 3) for name in ("end_to_end_tokens_per_s", "ttft_s")} | {
            "poisson_ttft_s", "poisson_ttft_p90_s", "poisson_tpot_s", "poisson_requests_per_s"
        }  # fmt: skip
        assert set(figures) - {f"decode_tokens_per_s, {batch}" for batch in (1, 3)} == always, "some answer too fast"
        assert all(len(figures[name]["msi"]) == 2 for name in always)
        arguments.input_len = 6
        await bench_peers.in_turns(running, 100, arguments)
        assert running == []
        assert "msi is left out: 400: too long" in capsys.readouterr().err
    finally:
        for server in running:
            await server.end()


def test_the_processor_is_named_with_its_units():
    assert any(kind in bench_peers.processor() for kind in ("(AVX2 only", "(AVX512"))
