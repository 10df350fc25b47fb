"""A stand-in for the parts of the W&B server that a run uses: it keeps runs, their history and
alerts in memory."""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "UHJvamVjdDox", "name": "rlhf", "entity": {"id": "RW50aXR5OjE=", "name": "me"}}
VIEWER = {
    "id": "VXNlcjox",
    "entity": "me",
    "username": "me",
    "email": "me@here",
    "admin": False,
    "flags": "{}",
    "teams": {"edges": []},
}


class Server:
    """Listens on 127.0.0.1 while it is used as a context.

    It can stop and start again at the same port with what it has stored.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}  # what each run said of itself
        self.streams: dict[str, dict[str, list[str]]] = {}  # lines of each file of a run
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.unknown: list[str] = []
        self.port = 0
        self.http: ThreadingHTTPServer | None = None

    def start(self) -> Server:
        handler = type("Handler", (Handler,), {"server_state": self})
        self.http = QuietServer(("127.0.0.1", self.port), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self.http:
            self.http.shutdown()
            self.http.server_close()
            self.http = None

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """For the processes that are to talk to it. The key is none."""
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.port}",
            "WANDB_API_KEY": "0" * 40,
            "no_proxy": "127.0.0.1",
        }

    def history(self, run: str) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in self.streams.get(run, {}).get("wandb-history.jsonl", [])
        ]


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that went away, as those do that are killed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data

    def do_GET(self) -> None:
        self.answer({}, 404)

    def do_PUT(self) -> None:  # an upload
        self.body()
        self.answer({})

    def do_POST(self) -> None:
        body, state = self.body(), self.server_state
        if self.path.endswith("/file_stream"):
            files = state.streams.setdefault(self.path.split("/")[-2], {})
            for name, part in (json.loads(body).get("files") or {}).items():
                files.setdefault(name, [])[part.get("offset", 0) :] = part["content"]
            return self.answer({})
        if self.path != "/graphql":
            return self.answer({})
        asked = json.loads(body)
        found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        self.answer({"data": self.ask(found[1] if found else "", asked.get("variables") or {})})

    def ask(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        state, here = self.server_state, f"http://{self.headers['host']}/storage"
        if name == "Viewer":
            return {"viewer": VIEWER}
        if name == "UpsertBucket":
            run = state.runs.setdefault(given["name"], {"config": "{}"})
            run |= {key: value for key, value in given.items() if value is not None}
            bucket = {
                "id": given["name"],
                "name": given["name"],
                "displayName": run.get("displayName"),
                "config": run["config"],
            }
            bucket |= {
                "description": "",
                "sweepName": None,
                "project": PROJECT,
                "historyLineCount": len(state.history(given["name"])),
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "RunResumeStatus":
            run = state.runs.get(given["name"])
            lines = state.streams.get(given["name"], {})
            bucket = run and {
                "id": given["name"],
                "name": given["name"],
                "displayName": run.get("displayName"),
                "config": run["config"],
            }
            for key, file in (
                ("history", "wandb-history.jsonl"),
                ("events", "wandb-events.jsonl"),
                ("log", "output.log"),
            ):
                some = lines.get(file, [])
                bucket = bucket and bucket | {
                    f"{key}LineCount": len(some),
                    f"{key}Tail": json.dumps(some[-1:]),
                }
            bucket = bucket and bucket | {
                "summaryMetrics": "{}",
                "tags": run.get("tags") or [],
                "wandbConfig": '{"t": 1}',
            }
            return {"model": PROJECT | {"bucket": bucket}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{here}/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if name == "NotifyScriptableRunAlert":
            state.alerts.append(given)
            return {"notifyScriptableRunAlert": {"success": True}}
        if name == "UpsertView2":
            state.views.append(given)
            return {
                "upsertView": {
                    "view": {"id": "VmlldzoxMjM=", "name": given["name"]},
                    "inserted": True,
                }
            }
        if name == "CreateArtifact":
            artifact = {
                "id": "QXJ0aWZhY3Q6MQ==",
                "state": "PENDING",
                "artifactSequence": {"latestArtifact": None},
            }
            return {"createArtifact": {"artifact": artifact}}
        if name in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            key = name[0].lower() + name[1:]
            return {
                key: {
                    "artifactManifest": {
                        "id": "1",
                        "file": {"id": "1", "uploadUrl": f"{here}/manifest", "uploadHeaders": []},
                    }
                }
            }
        if name == "CreateArtifactFiles":
            nodes = [
                {
                    "storagePath": f["name"],
                    "uploadUrl": f"{here}/{f['name']}",
                    "uploadHeaders": [],
                    "artifact": {"id": f["artifactID"]},
                }
                for f in given["input"]["artifactFiles"]
            ]
            return {
                "createArtifactFiles": {
                    "files": {
                        "edges": [{"node": node | {"uploadMultipartUrls": None}} for node in nodes]
                    }
                }
            }
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "1"}}}
        nothing: dict[str, Any] = {
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "ArtifactType": {"project": {"artifact": None}},
            "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": None}},
            "XXHashDigestsEnabled": {"entity": {"xxhashDigestsEnabled": False}},
            "FetchArtifactDigestAlgorithm": {"project": {"artifactType": None}},
            "ClientIDMapping": {"clientIDMapping": {"serverID": "QXJ0aWZhY3Q6MQ=="}},
        }
        if name not in nothing:
            state.unknown.append(name)
        return nothing.get(name, {})
