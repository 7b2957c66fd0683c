"""A stand-in for a vLLM server, to die and hang on command: `python fake_vllm.py PORT FOLDER NAME`.

It answers with numbers made of the seed, and counts what it does in files `NAME.*` of the folder. A file `NAME.faults`
has lines "VERB COUNT WHAT": at the COUNT-th call of a verb, over all its lives, it dies, hangs, fails (500) or refuses
(400); COUNT 0 means every call.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

PORT, FOLDER, NAME = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
LOCK = Lock()
STATE = {"label": "default", "tokens": 0, "paused": False}
DELAY_S = float(os.environ.get("DELAY_S", "0"))


def count(verb: str) -> int:
    with LOCK, (FOLDER / f"{NAME}.{verb}").open("a") as calls:
        calls.write("x")
        return calls.tell()


def fault(verb: str) -> str:
    path, number = FOLDER / f"{NAME}.faults", count(verb)
    for line in path.read_text().splitlines() if path.exists() else []:
        name, at, what = line.split()
        if name == verb and int(at) in (0, number):
            return what
    return ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def reply(self, content: Any, status: int = 200) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply("")
        elif self.path == "/weight_info":
            self.reply({"weight_version": STATE["label"]})
        else:
            self.reply(f'vllm:generation_tokens_total{{engine="0"}} {STATE["tokens"]}\n')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        verb = urlsplit(self.path).path.rsplit("/", 1)[1]
        what = fault(verb)
        if what == "dies":
            print("fake: it dies", flush=True)
            os._exit(9)
        if what == "hangs":
            time.sleep(3600)
        status = {"fails": 500, "refuses": 400}.get(what, 200)
        self.reply({"error": f"{verb} {what}"} if what else getattr(self, verb)(body), status)

    def pause(self, body: Any) -> Any:
        STATE["paused"] = True
        return {}

    def resume(self, body: Any) -> Any:
        STATE["paused"] = False
        return {}

    def collective_rpc(self, body: Any) -> Any:
        assert STATE["paused"] and body["method"] == "megatron_rl_take_files"
        return {"results": [{"w": len((Path(body["args"][1]) / "weights").read_text())}]}

    def update_weight_version(self, body: Any) -> Any:
        STATE["label"] = body["new_version"]
        return {}

    def reset_prefix_cache(self, body: Any) -> Any:
        return {"success": True}

    def generate(self, body: Any) -> Any:
        time.sleep(DELAY_S)
        seed, ids = body["sampling_params"]["seed"], body["token_ids"]
        with LOCK:
            STATE["tokens"] += 2
        choice = {
            "index": 0,
            "token_ids": [seed, *ids],
            "finish_reason": "stop",
            "logprobs": {"content": [{"logprob": -0.5}] * (1 + len(ids))},
            "weight_versions": [{"version": STATE["label"], "start": 0, "end": 1 + len(ids)}],
        }
        return {"choices": [choice]}


if __name__ == "__main__":
    if fault("start") == "dies":
        print("fake: it cannot start", flush=True)
        sys.exit(3)
    ThreadingHTTPServer.request_queue_size = 64
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
