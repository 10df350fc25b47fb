"""A vLLM server: start it, give it weights, ask it, stop it. No torch here.

vLLM needs other versions of torch and transformers than this project, so it is a program of its own
in an environment of its own, asked over HTTP. Its developer mode, by which it reads new weights,
runs any method that it is asked for: a server that is started here listens on this machine only.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from rlhf.base import watchdog
from rlhf.base.errors import UserError
from rlhf.base.files import private_folder
from rlhf.base.kept_process import KeptProcess
from rlhf.base.log import log, plural
from rlhf.base.server import Server, is_local
from rlhf.base.urls import shown_url
from rlhf.config.choices import Device, Precision
from rlhf.config.schema import Config
from rlhf.runs.environment import ALLOCATOR_NAMES, SPIN_NAMES, free_port
from rlhf.runs.locks import try_lock

LOG = "vllm.log"  # in the run directory: what a server says that the run has started
START_SECONDS = 1800.0  # until a server must answer; on a GPU it compiles for minutes
POLL_SECONDS = 0.5  # between two looks at a server that starts
REPORT_EVERY = 30.0  # seconds between two lines about a slow server
HEALTH_SECONDS = 10.0  # to answer that it is there
CACHE_WAITS = (0.0, 0.1, 0.5, 2.0, 5.0)  # seconds before each try to empty its cache
CONNECTIONS = 256  # requests at the same time; the server orders them by itself
DTYPES = {Precision.fp32: "float32", Precision.bf16: "bfloat16", Precision.autocast: "bfloat16"}
# of our process group, and settings that are made for training; and the keys of accounts
NOT_HANDED_ON = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("DS_ACCELERATOR", "OMP_NUM_THREADS", *SPIN_NAMES, *ALLOCATOR_NAMES),
    *("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"),
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
)
ABOUT_ANOTHER = re.compile("root cause above|Engine core initialization failed|EngineDeadError")
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, /reset_prefix_cache
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class ServerError(UserError):
    """A server that does not answer, or not as it should."""


class VllmServer:
    """The server of a run.

    Args:
        log_file: of a server that this starts.
        longest: tokens of a prompt and its response, at most.
    """

    def __init__(self, cfg: Config, log_file: Path, longest: int):
        self.cfg, self.log_file, self.longest = cfg, log_file, longest
        self.url = (cfg.rollout.vllm.url or "").rstrip("/")
        self.process: KeptProcess | None = None

    @property
    def is_own(self) -> bool:
        """Whether the run starts and stops it."""
        return self.cfg.rollout.vllm.command is not None

    @property
    def key(self) -> str:
        """The setting that names it, for messages."""
        if self.is_own:
            return f"rollout.vllm.command={self.cfg.rollout.vllm.command}"
        return f"rollout.vllm.url={shown_url(self.url)}"

    # ------------------------------------------------------------------------- its process

    def start(self, model: Path) -> None:
        """Start a server with a model, and wait until it answers.

        Raises: UserError with the last line that it has said.
        """
        self.stop()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {k: v for k, v in os.environ.items() if k not in NOT_HANDED_ON}
        if self.cfg.deploy.device == Device.cpu:
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        command = self.command(model, port)
        log.info(f"starting the vLLM server: {shlex.join(command)}")
        said_before = self.log_file.stat().st_size if self.log_file.exists() else 0
        self.process = KeptProcess(command, environment | ENVIRONMENT, self.log_file)
        started = next_report = time.monotonic()
        while not self.is_healthy():
            watchdog.progress()
            now = time.monotonic()
            code = self.process.exit_code()
            if code is not None or now > started + START_SECONDS:
                how = f"does not answer after {START_SECONDS:g} s" if code is None else ""
                self.stop()
                raise UserError(
                    f"{self.key}: the server {how or f'ended with exit code {code}'}: "
                    f"{last_error_line(self.log_file, said_before)}; its log: {self.log_file}"
                )
            if now > next_report + REPORT_EVERY:
                log.info(f"the vLLM server is starting, for {now - started:.0f} s: {self.log_file}")
                next_report = now
            time.sleep(POLL_SECONDS)
        log.info(f"the vLLM server answers after {time.monotonic() - started:.0f} s: {self.url}")

    def command(self, model: Path, port: int) -> list[str]:
        """The user's command, with our options behind `serve` and the user's after them."""
        words = shlex.split(self.cfg.rollout.vllm.command or "")
        place = words.index("serve") + 1
        ours = [str(model), "--host", "127.0.0.1", "--port", str(port)]
        ours += ["--served-model-name", "policy", "--dtype", DTYPES[self.cfg.deploy.precision]]
        ours += ["--max-model-len", str(self.longest)]
        ours += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        ours += ["--disable-uvicorn-access-log"]
        return words[:place] + ours + words[place:]

    def stop(self) -> None:
        """End a server that the run has started."""
        if self.process:
            self.process.close()
            self.process = None

    def get(self, path: str) -> httpx.Response | None:
        """What it answers to a short question; None where it does not answer."""
        try:
            address = httpx.URL(f"{self.url}/{path}")
            return httpx.get(address, timeout=HEALTH_SECONDS, trust_env=not is_local(address.host))
        except (httpx.TransportError, httpx.InvalidURL):
            return None

    def is_healthy(self) -> bool:
        """Whether it answers, and its engine is well."""
        answer = self.get("health")
        return answer is not None and answer.is_success

    def check(self) -> None:
        """Check a server that the run has not started. Raises: UserError with what is missing."""
        if not self.is_healthy():
            raise UserError(
                f"{self.key}: no server answers there: start one, or correct the address"
            )
        models = self.get("v1/models")
        if models is not None and models.status_code == 401:
            raise UserError(f"{self.key}: the server wants an API key, which is not supported")
        try:
            room = int(models.json()["data"][0]["max_model_len"]) if models else 0
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{self.key}: this is no vLLM server: it names no model and no max_model_len"
            ) from None
        if room < self.longest:
            raise UserError(
                f"{self.key}: the server reads {room} tokens at most, and a prompt with its "
                f"response has up to {self.longest}: start it with --max-model-len {self.longest}"
            )
        try:
            self.ask("reset_prefix_cache", {})
        except ServerError:
            raise UserError(
                f"{self.key}: the server cannot take new weights: start it with "
                "VLLM_SERVER_DEV_MODE=1 in its environment"
            ) from None
        if not self.gives_processed_logprobs():
            raise UserError(
                f"{self.key}: its log-probs are not those that it samples from: start it with "
                "--logprobs-mode processed_logprobs"
            )

    def gives_processed_logprobs(self) -> bool:
        """Whether log-probs are those of the distribution that a token is sampled from.

        Of a token that alone is allowed that is 0, and else what the model gives it.
        """
        only = {"prompt": [1, 1], "max_tokens": 1, "allowed_token_ids": [1], "temperature": 1.0}
        answer = self.ask("v1/completions", only | {"logprobs": 0, "ignore_eos": True})
        return abs(answer["choices"][0]["logprobs"]["token_logprobs"][0]) < 1e-6

    # ------------------------------------------------------------------------ its answers

    def load(self, model: Path) -> None:
        """Replace its weights, and forget what it has computed with the old ones.

        Raises: ServerError.
        """
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
        try:  # once: a server that has failed to load weights has none
            asyncio.run(self._ask_all("collective_rpc", [arguments], "", waits=()))
        except ServerError as error:
            raise ServerError(
                f"{self.key}: it cannot load {model} ({error}): it must be able to read that "
                "folder (rollout.vllm.weights_dir); start the server again"
            ) from None
        for wait in CACHE_WAITS:  # it keeps what the last responses have used for a moment
            time.sleep(wait)
            if self.ask("reset_prefix_cache", {})["success"]:
                return
        raise ServerError(
            f"{self.key}: the server cannot empty its prefix cache: another program is using it"
        )

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to one request. Raises: ServerError."""
        return asyncio.run(self._ask_all(path, [body], ""))[0]

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answers of /v1/completions, asked at the same time, one choice each.

        Raises: ServerError, also for a response that the server has not sampled to its end.
        """
        report = "the vLLM server has answered"
        answers = asyncio.run(self._ask_all("v1/completions", bodies, report))
        choices: list[dict[str, Any]] = [answer["choices"][0] for answer in answers]
        for reason in {choice["finish_reason"] for choice in choices} - {"stop", "length"}:
            raise ServerError(f"{self.key}: the server has ended a response ({reason})")
        return choices

    async def _ask_all(
        self,
        path: str,
        bodies: Sequence[Mapping[str, Any]],
        report: str,
        waits: Sequence[float] | None = None,
    ) -> list[Any]:
        """Args: report: begins the lines about a slow server; empty: none.  waits: as of Server."""
        server = Server(f"{self.url}/{path}", timeout=None, waits=waits)
        free = asyncio.Semaphore(CONNECTIONS)

        async def post(body: Mapping[str, Any]) -> Any:
            async with free:
                return await server.post(body)

        try:
            async with server.open():
                waiting = [asyncio.create_task(post(body)) for body in bodies]
                reporting = asyncio.create_task(report_progress(waiting, report))
                try:
                    return await asyncio.gather(*waiting)
                finally:
                    for task in (reporting, *waiting):
                        task.cancel()
        except UserError as error:
            raise ServerError(str(error)) from None


async def report_progress(tasks: Sequence[asyncio.Task[Any]], what: str) -> None:
    """Say every 30 s how many requests are answered."""
    started = time.monotonic()
    while what:
        await asyncio.sleep(REPORT_EVERY)
        done = sum(task.done() for task in tasks)
        log.info(
            f"{what} {done} of {plural(len(tasks), 'request')} after "
            f"{time.monotonic() - started:.0f} s"
        )


@contextlib.contextmanager
def hold_url(url: str) -> Iterator[None]:
    """Within this context no other run on this machine uses a server.

    Raises: UserError where one does.
    """
    try:
        plain = httpx.URL(url).copy_with(username=None, password=None, path="/", query=None)
        address = str(plain.copy_with(host="127.0.0.1") if is_local(plain.host) else plain)
    except httpx.InvalidURL as error:
        raise UserError(f"rollout.vllm.url={shown_url(url)}: not a URL: {error}") from None
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    try:
        folder = private_folder(Path(tempfile.gettempdir()) / f"rlhf-vllm-{os.getuid()}")
    except OSError as error:
        raise UserError(f"no folder for the locks of servers: {error}") from None
    with try_lock(folder / name) as is_free:
        if not is_free:
            raise UserError(
                f"rollout.vllm.url={shown_url(url)}: another run uses this server, and both "
                "would give it weights: start a second server, or wait for that run"
            )
        yield


def last_error_line(file: Path, start: int = 0) -> str:
    """The last line of a log that names an error and is not about another one; else its last line.

    Args: start: bytes of it that are older.
    """
    text = file.read_bytes()[start:].decode("utf-8", errors="replace")
    said = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in said if "Error" in line or "error:" in line]
    causes = [line for line in errors if not ABOUT_ANOTHER.search(line)]
    return (causes or errors or said or ["it said nothing"])[-1]
