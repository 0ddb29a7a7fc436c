"""The keys of the engine that samples in RL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

from posttrain.cards import ServerCards
from posttrain.config.knob import Keys, knob
from posttrain.uris import loopback

TRANSFERS_OF = {
    "embedded": ("shared", "copy"),
    "vllm": ("copy", "file", "delta"),
    "vllm_server": ("file", "delta", "broadcast"),
    "sglang": ("file",),
}
"""The ways in which each engine can take weights, the best first."""
_VLLM = ("dtype", "max_model_len", "memory_gib", "tensor_parallel_size")
_STARTED = (*_VLLM, "enforce_eager")
_SERVER = ("timeout_s", "start_timeout_s", "max_restarts", "pause")
_OWN_SERVER = ("replicas", "placement")
_GIVEN = ("token_env", "token_file")
OF_TRAINING = ("max_staleness", "exact", "routed_experts")
"""What is between the engine and a loss that compares with it."""

# fmt: off
# One key a line, as in `stages`.


class RolloutKeys(Keys):
    """Which engine samples, and how it is started; under vLLM's own names where it has one. A key that the chosen engine does not read is refused."""

    engine: Literal["embedded", "vllm", "vllm_server", "sglang"] = knob("embedded", "What samples: our own engine, on the weights in training; vLLM in this process; a server of vLLM beside it (pip install 'posttrain[vllm]'); or a server of SGLang at `url`.", also="use_vllm (TRL)")
    exact: bool = knob(False, "Make the embedded engine's log-probs the trainer's to the last bit: slower; on one thread of a CPU, or on a card that keeps its bits in a probe at the start.")
    pad_prompts: bool = knob(False, "The embedded engine attends to distinct prompts of near length in one call, the shorter ones filled up, where that is counted as less work; faster on a CPU for evals and wide batches, and the last bits of log-probs are others than without.")
    prepack: bool = knob(False, "The embedded engine lays the weights out for oneDNN's products in each call of two rows or more, and encodes and decodes with these; on a CPU, in float32, for Llama, Mistral, Qwen2 and Qwen3: faster, with the weights in memory a second time while it samples, and the last bits of log-probs are others than without.")
    native_kernels: bool = knob(False, "The embedded engine's norms, rotation, attention and SwiGLU are kernels that the machine's C compiler (cc, gcc or clang) builds when the engine starts, in less than a second; on a CPU, in float32, for Llama, Mistral, Qwen2 and Qwen3: faster, and the last bits of log-probs are others than without.")
    prefix_cache_gib: float = knob(0.0, "GiB in which the embedded engine keeps keys and values of how prompts begin, in blocks of 128 tokens, until the weights change: faster where prompts share a long beginning (few-shot examples, a system message), slower where they do not, and the last bits of log-probs are others than without.", ge=0, example=0.5)
    routed_experts: Literal["off", "compare", "replay"] = knob("off", "Of a mixture of experts, whether the engine says which experts each sampled token was computed with: `compare` logs how often the trainer's routers choose others (router/mismatch), `replay` also makes them choose the same, with the weights that their own logits give them (R3, arXiv 2510.11370).", example="replay", also="router_replay.mode (verl)")
    speculation: Literal["off", "suffix"] = knob("off", "`suffix` has the embedded engine guess how a completion goes on, from completions of the same prompt (siblings that are ahead, earlier epochs) and from its own end, and verify up to 7 tokens in one pass: the same tokens from the same random numbers, on a CPU faster where a prompt comes again and completions are alike; with `exact: true` the same log-probs to the bit, else their last bits differ.", also="speculative_config (vLLM)", example="suffix")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "Dtype that vLLM computes in; `auto` is the trainer's.")
    max_model_len: int | None = knob(None, "Longest prompt and answer together, in tokens; null is as long as model and memory allow.", ge=2, also="vllm_max_model_length (TRL)", example=4096)
    memory_gib: float | None = knob(None, "GiB for vLLM's keys and values; null takes 1 on a CPU, 8 on a GPU.", gt=0, example=4.0)
    tensor_parallel_size: int = knob(1, "Processes that vLLM splits the model over.", ge=1, also="vllm_tensor_parallel_size (TRL)")
    enforce_eager: bool = knob(False, "Compile nothing and record no CUDA graphs: `vllm` and servers of it that the run starts as vLLM means it, `embedded` decodes by the loop of a CPU; on a CPU neither does anyway.")
    transfer: Literal["auto", "shared", "copy", "file", "delta", "broadcast"] = knob("auto", "How weights get to the engine; `auto` is the first that it can: `embedded` decodes with those in training (`shared`), or with several processes and where groups are made ahead on a whole `copy`; `shared` with several processes gathers them layer by layer for each token, slowly and without a copy; `vllm` takes a `copy` or a `file`, `vllm_server` and `sglang` a `file`; vLLM takes a file of what changed too (`delta`), and a server of it that the run starts a `broadcast`, without files.")
    delta_anchor: int = knob(20, "With `transfer: delta`, every so many pushes the whole model is sent.", ge=1)
    replicas: int = knob(1, "Servers of vLLM that the run starts; groups are dealt to them, and what one that died had not answered is asked of the others.", ge=1, also="num_engines, vllm_num_engines (OpenRLHF)", example=2)
    placement: Literal["auto", "colocated", "split"] = knob("auto", "Cards of the servers of vLLM that the run starts: `colocated` on those that train, where a server that is not sampling sleeps unless groups are made ahead; `split` on others, `replicas` × `tensor_parallel_size` of them. `auto` is colocated, but with --ray and cards split. Without cards it decides nothing.", example="split")
    max_staleness: int = knob(0, "Generation batches that the weights a completion began with may be older than those it is trained on with; 0 takes turns, above it groups are made ahead while the trainer trains.", ge=0, also="max_head_offpolicyness (AReaL), max_off_policy_steps (prime-rl)", example=1)
    url: str | None = knob(None, "A server that runs already, on this machine, for `vllm_server` or `sglang`; null starts one of vLLM that ends with the run.", also="vllm_server_base_url (TRL)", example="http://127.0.0.1:8000")
    token_env: str = knob("VLLM_API_KEY", "Environment variable that holds the API key of the server at `url`.")
    token_file: str | None = knob(None, "File that holds it; goes before the variable.", example="~/.config/vllm.key")
    pause: Literal["wait", "keep", "abort"] = knob("wait", "What an update does with completions that a server is sampling: wait for them, go on with them under the new weights, or end them.")
    timeout_s: float = knob(30.0, "Seconds after which a server that does not answer is taken for dead: a call that changes its state, or the question whether it lives.", gt=0)
    start_timeout_s: float = knob(600.0, "Seconds that a server may take until it answers.", gt=0, also="vllm_server_timeout (TRL)")
    max_restarts: int = knob(2, "How often a server that died is started again, or one at `url` is waited for; the stage goes on with what it had not answered.", ge=0)

    @property
    def way(self) -> str:
        """`transfer`, with `auto` resolved."""
        return TRANSFERS_OF[self.engine][0] if self.transfer == "auto" else self.transfer

    def takes_copy(self, *, sharded: bool) -> bool:
        """Whether our engine decodes on a whole copy of the weights in training."""
        return bool(self.max_staleness) or self.transfer == "copy" or (sharded and self.transfer == "auto")

    def given(self, *names: str) -> Iterator[tuple[str, str]]:
        """Those of these keys that are not as they are by default, with their value as a YAML has it."""
        for name in names:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                yield name, str(value).lower()

    @property
    def starts_servers(self) -> bool:
        return self.engine == "vllm_server" and self.url is None

    def cards(self, trainers: int) -> ServerCards:
        """Beside so many training processes of a machine."""
        return ServerCards(self.placement == "split", trainers, self.replicas, self.tensor_parallel_size)

    @property
    def of_one_process(self) -> tuple[str, str] | None:
        """What of these keys several training processes cannot sample with, and what to set instead."""
        found = {
            "rollout.engine: vllm_server": "rollout.engine: vllm" if self.engine == "vllm" else "",
            "rollout.exact: false": "rollout.exact: true" if self.exact else "",
            "rollout.max_staleness: 0": f"rollout.max_staleness: {self.max_staleness}" if self.max_staleness else "",
        }
        return next(((said, instead) for instead, said in found.items() if said), None)

    @model_validator(mode="after")
    def _carries_weights(self) -> RolloutKeys:
        ways = TRANSFERS_OF[self.engine]
        if self.way not in ways:
            raise ValueError(f"rollout.transfer: {self.transfer} with rollout.engine: {self.engine}, which takes its weights by {' or '.join(ways)}")
        return self

    @model_validator(mode="after")
    def _broadcasts_to_its_own(self) -> RolloutKeys:
        if self.way == "broadcast" and self.url:
            raise ValueError(f"rollout.transfer: broadcast with rollout.url: {self.url}; only a server that the run starts joins a group with it; set transfer: file, or remove url")
        return self

    @model_validator(mode="after")
    def _only_ours_is_exact(self) -> RolloutKeys:
        if self.exact and self.engine != "embedded":
            raise ValueError(f"rollout.exact: true with rollout.engine: {self.engine}; only the embedded engine can be; set exact: false")
        if self.exact and self.transfer == "copy":
            raise ValueError("rollout.exact: true with rollout.transfer: copy; only the weights in training give log-probs to the last bit; set transfer: shared")
        return self

    @model_validator(mode="after")
    def _says_its_experts(self) -> RolloutKeys:
        asked = f"rollout.routed_experts: {self.routed_experts}"
        if self.routed_experts != "off" and self.engine == "sglang":
            raise ValueError(f"{asked} with rollout.engine: sglang, which is not asked for them here; set routed_experts: off, or engine: vllm_server or embedded")
        if self.routed_experts != "off" and self.exact:
            raise ValueError(f"{asked} with rollout.exact: true, whose log-probs are the trainer's already; remove one of them")
        return self

    @model_validator(mode="after")
    def _hurries_only_ours(self) -> RolloutKeys:
        if self.exact or self.engine != "embedded":
            beside = "rollout.exact: true" if self.exact else f"rollout.engine: {self.engine}"
            asked = {
                "pad_prompts: true": self.pad_prompts and "attends to prompts",
                "prepack: true": self.prepack and "multiplies",
                "native_kernels: true": self.native_kernels and "computes",
                f"prefix_cache_gib: {self.prefix_cache_gib:g}": self.prefix_cache_gib and "encodes prompts",
            }
            for said, does in asked.items():
                if does:
                    raise ValueError(f"rollout.{said} with {beside}, which {does} in its own way; remove one of them")
        return self

    @model_validator(mode="after")
    def _speculates_by_itself(self) -> RolloutKeys:
        if self.speculation != "off" and self.engine != "embedded":
            raise ValueError(f"rollout.speculation: {self.speculation} with rollout.engine: {self.engine}; only the embedded engine drafts; set speculation: off")
        return self

    @model_validator(mode="after")
    def _reads_every_key(self) -> RolloutKeys:
        unread = {
            "rollout.engine: embedded": (*_VLLM, "url", *_SERVER, *_OWN_SERVER, *_GIVEN) if self.engine == "embedded" else (),
            "rollout.engine: vllm": ("url", *_SERVER, *_OWN_SERVER, *_GIVEN) if self.engine == "vllm" else (),
            "rollout.engine: sglang": ("pause", *_OWN_SERVER) if self.engine == "sglang" else (),
            "rollout.url": (*_STARTED, *_OWN_SERVER) if self.url else (),
            f"rollout.transfer: {self.way}": () if self.way == "delta" else ("delta_anchor",),
            "no rollout.url": () if self.url else _GIVEN,
        }
        for beside, names in unread.items():
            for name, _ in self.given(*names):
                raise ValueError(f"rollout.{name} does nothing with {beside}; remove it, or choose what reads it")
        return self

    @model_validator(mode="after")
    def _names_its_server(self) -> RolloutKeys:
        if self.engine == "sglang" and not self.url:
            raise ValueError("rollout.engine: sglang without rollout.url; start SGLang yourself and set url: http://127.0.0.1:30000")
        return self

    @model_validator(mode="after")
    def _can_be_ahead(self) -> RolloutKeys:
        if not self.max_staleness:
            return self
        ahead = f"rollout.max_staleness: {self.max_staleness}"
        if self.transfer == "shared":
            raise ValueError(f"rollout.transfer: shared with {ahead}; the weights in training move while it samples; set transfer: copy, or max_staleness: 0")
        if self.exact:
            raise ValueError(f"rollout.exact: true with {ahead}; log-probs under older weights are not the trainer's; set exact: false, or max_staleness: 0")
        if self.speculation != "off":
            raise ValueError(f"rollout.speculation: {self.speculation} with {ahead}; what is drafted would depend on which thread samples first, and the last bits with it; set speculation: off, or max_staleness: 0")
        if self.engine == "sglang":
            raise ValueError(f"rollout.engine: sglang with {ahead}; it does not say which weights each token was sampled from; set engine: vllm_server, or max_staleness: 0")
        if self.pause == "abort":
            raise ValueError(f"rollout.pause: abort with {ahead}; completions that an update ends early are not trained on; set pause: keep, or wait")
        return self

    @model_validator(mode="after")
    def _stays_on_this_machine(self) -> RolloutKeys:
        if self.url:
            loopback(self.url)
        return self
