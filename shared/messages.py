"""Every message that crosses a socket.

A message is a frozen dataclass; its fields' annotations (with `Range` and `Array` marks) are its schema, from which
`shared/wire.py` builds the codec and the validation. Verbs ask, nouns answer. Token runs of a few entries travel in
the header; prompts and logits travel as arrays in frames of their own.

Positions count tokens of a session from the first prompt token, 0. Times are microseconds unless named otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt

from shared.fields import Array, Range
from shared.sampling.params import SamplingParams

PROTOCOL_VERSION = 4

MAX_CONTEXT = 1 << 20
MAX_RUN = 64
"""Most tokens in one proposal, and most proposals verified in one step of a session."""
MAX_STEP_SESSIONS = 256
MAX_TEXT = 8 << 20
MAX_U32 = 2**32 - 1
MAX_MICROS = 2**53
MAX_MARKS = 1 << 16
"""Most marks in one `Trace`."""
MAX_SOURCES = 1024

U32 = Annotated[int, Range(0, MAX_U32)]
U64 = Annotated[int, Range(0, 2**64 - 1)]
VocabSize = Annotated[int, Range(0, 1 << 24)]
Token = Annotated[int, Range(0, 2**31 - 1)]
Position = Annotated[int, Range(0, MAX_CONTEXT)]
Micros = Annotated[int, Range(0, MAX_MICROS)]
ClockNanos = Annotated[int, Range(0, 2**62)]
OffsetNanos = Annotated[int, Range(-(2**62), 2**62)]
Count = Annotated[int, Range(0, 2**53)]
"""Of something, since a process started; exact as a float too."""
Name = Annotated[str, Range(0, 200)]
Sentence = Annotated[str, Range(0, 4000)]
Run = Annotated[tuple[Token, ...], Range(0, MAX_RUN + 1)]
TokenArray = Annotated[npt.NDArray[np.int32], Array("int32", 1, MAX_CONTEXT)]
IdArray = Annotated[npt.NDArray[np.int32], Array("int32", 1, 1 << 24)]
FloatArray = Annotated[npt.NDArray[np.float32], Array("float32", 1, 1 << 24)]
MAX_Q = 1024
"""Most entries of one token's draft distribution."""
DraftIds = Annotated[npt.NDArray[np.int32], Array("int32", 1, MAX_RUN * MAX_Q)]
DraftProbs = Annotated[npt.NDArray[np.float32], Array("float32", 1, MAX_RUN * MAX_Q)]
DoubleArray = Annotated[npt.NDArray[np.float64], Array("float64", 1, 1 << 20)]
MarkRows = Annotated[npt.NDArray[np.int64], Array("int64", 2, 9 * MAX_MARKS)]
IdRows = Annotated[npt.NDArray[np.int32], Array("int32", 2, 1 << 24)]
FloatRows = Annotated[npt.NDArray[np.float32], Array("float32", 2, 1 << 26)]

Role = Literal["gateway", "verifier", "draft"]
FinishReason = Literal["", "stop", "length", "cancelled"]
"""Why a generation ended; empty while it goes on."""

_NO_IDS = np.empty(0, np.int32)
_NO_FLOATS = np.empty(0, np.float32)


# --- Any peer <-> the one it talks to ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """Peer -> router: who is there. Sent on start and again whenever the router does not know the peer.

    instance: the peer's own name, unique in its role. boot: a random number drawn at process start.
    vocab_fingerprint: of its engine's vocabulary; empty where the peer has none (gateway, n-gram drafts).
    n_slots: sessions that it can hold. quant: of its model, the name of the recipe ("Q4_K_M"). uptime_s: of its process
    when this was sent; no part of who it is.
    """

    role: Role
    instance: Name
    boot: U64
    engine: Name = ""
    model: Name = ""
    vocab_fingerprint: Name = ""
    n_vocab: VocabSize = 0
    n_ctx: Position = 0
    n_slots: U32 = 0
    row_invariant: bool = False
    version: Name = ""
    quant: Name = ""
    uptime_s: U32 = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """Router -> peer: registered. A changed `boot` means that the router has forgotten all sessions."""

    boot: U64
    heartbeat_ms: U32


@dataclass(frozen=True, slots=True)
class Ping:
    """Router -> peer, every heartbeat; CLI -> router, tokenizer or sampler.

    sent_ns: the asker's monotonic clock, to be returned as it is.
    """

    sent_ns: U64


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to Ping. clock_ns: the answerer's own monotonic clock; 0: not given."""

    sent_ns: U64
    clock_ns: ClockNanos = 0


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Peer -> router: it is draining; no new sessions, and those it has may finish."""

    reason: Name


@dataclass(frozen=True, slots=True)
class Error:
    """Answer to any message that cannot be served.

    ref: the request or session that it belongs to; 0 where the message could not even be read.
    code: a stable snake_case word; message and remedy are for people.
    retry_after_s: 0 where trying again does not help.
    """

    ref: U64
    code: Name
    message: Sentence
    remedy: Sentence = ""
    retry_after_s: U32 = 0


# --- Gateway <-> tokenizer --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Describe:
    """Gateway -> tokenizer: what vocabulary is this?"""

    ref: U64


@dataclass(frozen=True, slots=True)
class Description:
    """Tokenizer -> gateway. eog_ids: tokens that end a generation. chat_template: Jinja source, or empty."""

    ref: U64
    model: Name
    vocab_fingerprint: Name
    n_vocab: VocabSize
    n_ctx_train: U32
    eog_ids: Annotated[tuple[Token, ...], Range(0, 256)]
    chat_template: Annotated[str, Range(0, 1 << 20)] = ""


@dataclass(frozen=True, slots=True)
class Encode:
    """Gateway -> tokenizer: text to token ids. parse_special: control tokens written in the text count as such."""

    ref: U64
    text: Annotated[str, Range(0, MAX_TEXT)]
    parse_special: bool = True
    add_bos: bool = True


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokenizer -> gateway. tokens: [n] int32."""

    ref: U64
    tokens: TokenArray


@dataclass(frozen=True, slots=True)
class Decode:
    """Gateway -> tokenizer: the next tokens of a stream to text.

    carry: what the previous `Decoded` of this stream returned (bytes of an unfinished character).
    first: these are the stream's first tokens. last: flush the carry. special: render control tokens too.
    """

    ref: U64
    tokens: TokenArray
    carry: Annotated[bytes, Range(0, 64)] = b""
    first: bool = False
    last: bool = False
    special: bool = False


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tokenizer -> gateway. pieces: the text that each token completed, in order; joined, the stream's next text."""

    ref: U64
    pieces: Annotated[tuple[str, ...], Range(0, MAX_CONTEXT + 1)]
    carry: Annotated[bytes, Range(0, 64)]


# --- Gateway <-> router -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """When a generation ends: after max_tokens tokens, or with one of stop_tokens."""

    max_tokens: Annotated[int, Range(1, MAX_CONTEXT)]
    stop_tokens: Annotated[tuple[Token, ...], Range(0, 256)] = ()


@dataclass(frozen=True, slots=True)
class Speculation:
    """draft: "auto", "none", or a draft worker's instance name. n_max: most proposals verified in a step.

    n_min: where fewer would be verified, none are. p_min: a proposal in which the draft has less confidence is not
    verified, nor is what follows it. Both as in llama-server; bounds on what the verifier chooses by itself.
    """

    draft: Name = "auto"
    n_max: Annotated[int, Range(0, MAX_RUN)] = MAX_RUN
    n_min: Annotated[int, Range(0, MAX_RUN)] = 0
    p_min: Annotated[float, Range(0.0, 1.0)] = 0.0


@dataclass(frozen=True, slots=True)
class Generate:
    """Gateway -> router: continue this prompt. request: unique for the gateway. tokens: [n] int32, n >= 1."""

    request: U64
    tokens: TokenArray
    sampling: SamplingParams
    limits: Limits
    speculation: Speculation = field(default_factory=Speculation)


@dataclass(frozen=True, slots=True)
class Cancel:
    """Gateway -> router: stop this generation; answered by `Finished`."""

    request: U64


@dataclass(frozen=True, slots=True)
class Tokens:
    """Router -> gateway: committed tokens, in order. The first n_accepted of them were proposed by the draft."""

    request: U64
    tokens: Run
    n_accepted: Annotated[int, Range(0, MAX_RUN + 1)]


@dataclass(frozen=True, slots=True)
class TargetStats:
    """One generation as the verifier saw it.

    rounds: steps with rows of this session after prefill. n_proposed, n_accepted: proposals verified and accepted.
    by_depth: for each depth (proposed, accepted). n_cached: prompt tokens that were not computed again.
    prefill_us, verify_us: in the target engine. sample_us: in the sampler. wire_us: the exchange with the sampler
    beyond that. wait_us: the rest of the time between first commit and end. full_rows: rows that had to travel whole.
    n_stale: proposed tokens that came too late to be verified. session: its id.
    """

    n_prompt: Position = 0
    n_cached: Position = 0
    n_generated: Position = 0
    rounds: U32 = 0
    n_proposed: U32 = 0
    n_accepted: U32 = 0
    by_depth: Annotated[tuple[tuple[U32, U32], ...], Range(0, MAX_RUN)] = ()
    n_stale: U32 = 0
    full_rows: U32 = 0
    queue_us: Micros = 0
    prefill_us: Micros = 0
    decode_us: Micros = 0
    verify_us: Micros = 0
    sample_us: Micros = 0
    wire_us: Micros = 0
    wait_us: Micros = 0
    session: U64 = 0


@dataclass(frozen=True, slots=True)
class DraftStats:
    """The same generation on the draft side. worker: the last one that drafted, or empty."""

    worker: Name = ""
    n_drafted: U32 = 0
    prefill_us: Micros = 0
    decode_us: Micros = 0
    worker_changes: U32 = 0


@dataclass(frozen=True, slots=True)
class ModelLabel:
    """What computed one side of a generation. model: its file's name; quant: of its recipe. Empty: nothing did."""

    model: Name = ""
    quant: Name = ""
    engine: Name = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """Router -> gateway: the generation has ended; no more `Tokens` follow.

    target_label: of its verifier. draft_label: of the worker that drafted last.
    """

    request: U64
    reason: FinishReason
    target: TargetStats
    draft: DraftStats
    target_label: ModelLabel = field(default_factory=ModelLabel)
    draft_label: ModelLabel = field(default_factory=ModelLabel)


# --- Router <-> verifier ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenTarget:
    """Router -> verifier: begin a session. tokens: [n] int32, the prompt."""

    session: U64
    tokens: TokenArray
    sampling: SamplingParams
    limits: Limits
    speculation: Speculation = field(default_factory=Speculation)


@dataclass(frozen=True, slots=True)
class Close:
    """Router -> verifier or draft: end the session, free its slot; a verifier answers an unknown one with `Error`."""

    session: U64


@dataclass(frozen=True, slots=True)
class Proposal:
    """Draft -> router -> verifier: tokens that continue the prefix named by its length and hash.

    start: position of tokens[0]. prefix_hash: of the session's tokens before `start` (`shared/prefix.py`).
    confidence: how sure the draft is that the target says the same, for each token (`shared/sampling/drafting.py`). The
    q arrays are empty except under rejection sampling: the
    sparse distributions that the tokens were drawn from, q_counts[i] entries for token i.
    prefill_us, decode_us: the engine time that this run cost, for statistics. n_prefilled: tokens that were read in
    prefill_us; what a cache still held is not among them.
    """

    session: U64
    start: Position
    prefix_hash: U64
    tokens: Annotated[tuple[Token, ...], Range(1, MAX_RUN)]
    confidence: Annotated[tuple[float, ...], Range(0, MAX_RUN)] = ()
    q_counts: Annotated[tuple[U32, ...], Range(0, MAX_RUN)] = ()
    q_ids: DraftIds = field(default_factory=lambda: _NO_IDS)
    q_probs: DraftProbs = field(default_factory=lambda: _NO_FLOATS)
    prefill_us: Micros = 0
    decode_us: Micros = 0
    n_prefilled: U32 = 0


@dataclass(frozen=True, slots=True)
class Commit:
    """Verifier -> router -> draft: tokens that are final.

    start: position of tokens[0]. prefix_hash: of the tokens before `start`. n_accepted: how many of them were
    proposed. known: end position of the proposals that the verifier still holds after this commit, so that a draft
    can tell that some were lost. stats: given with the last commit only.
    """

    session: U64
    start: Position
    prefix_hash: U64
    tokens: Run
    n_accepted: Annotated[int, Range(0, MAX_RUN + 1)]
    known: Position
    finish: FinishReason = ""
    stats: TargetStats | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """Verifier -> router, now and then while it steps, and when it stops: what steps of so many rows cost lately.

    points: (rows, microseconds), rows ascending, the first of 1 row. n_steps: passes of the target since its start,
    prefill included; n_step_sessions: sessions in them, added up.
    """

    points: Annotated[tuple[tuple[U32, Micros], ...], Range(1, 64)]
    n_steps: Count = 0
    n_step_sessions: Count = 0


# --- Router <-> draft -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenDraft:
    """Router -> draft: begin to draft for a session. tokens: [n] int32, prompt and commits so far.

    window: how many tokens the draft may run ahead of the last commit.
    """

    session: U64
    tokens: TokenArray
    sampling: SamplingParams
    stop_tokens: Annotated[tuple[Token, ...], Range(0, 256)]
    window: Annotated[int, Range(1, MAX_RUN)]


# --- Verifier <-> sampler ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenSampling:
    """Verifier -> sampler: a session's parameters and its tokens so far ([n] int32). No answer."""

    session: U64
    tokens: TokenArray
    n_prompt: Position
    n_vocab: VocabSize
    sampling: SamplingParams
    limits: Limits


@dataclass(frozen=True, slots=True)
class CloseSampling:
    """Verifier -> sampler: forget these sessions. No answer."""

    sessions: Annotated[tuple[U64, ...], Range(0, MAX_STEP_SESSIONS)]


@dataclass(frozen=True, slots=True)
class VerifyItem:
    """One session's part of a `Verify`: len(tokens) + 1 rows, row j conditional on tokens[:j].

    start: position of tokens[0] and so of what row 0 predicts. n_asked: how many entries of `asked_ids` are its own.
    q_counts: as in Proposal, one per token; empty unless rejection sampling.
    """

    session: U64
    start: Position
    prefix_hash: U64
    tokens: Run
    n_asked: U32 = 0
    q_counts: Annotated[tuple[U32, ...], Range(0, MAX_RUN)] = ()


@dataclass(frozen=True, slots=True)
class Verify:
    """Verifier -> sampler: the target's logits for one step, sparse.

    Rows of all items in order, R in all. top_ids [R, K] int32 and top_logits [R, K] float32: the K largest logits,
    descending. lse [R] float64: log-sum-exp over the whole vocabulary. asked_ids: each item's ids, one after the
    other; asked_logits: for each item [rows, n_asked], flattened. q_ids, q_probs: the items' draft distributions.
    """

    step: U64
    items: Annotated[tuple[VerifyItem, ...], Range(1, MAX_STEP_SESSIONS)]
    top_ids: IdRows
    top_logits: FloatRows
    lse: DoubleArray
    asked_ids: IdArray = field(default_factory=lambda: _NO_IDS)
    asked_logits: FloatArray = field(default_factory=lambda: _NO_FLOATS)
    q_ids: IdArray = field(default_factory=lambda: _NO_IDS)
    q_probs: FloatArray = field(default_factory=lambda: _NO_FLOATS)


@dataclass(frozen=True, slots=True)
class NeedRows:
    """Sampler -> verifier: these rows (indexes into the step's R) cannot be decided from their top K."""

    step: U64
    rows: Annotated[tuple[U32, ...], Range(1, MAX_STEP_SESSIONS * (MAX_RUN + 1))]


@dataclass(frozen=True, slots=True)
class FullRows:
    """Verifier -> sampler: answer to NeedRows. logits: [len(rows), n_vocab] float32."""

    step: U64
    rows: Annotated[tuple[U32, ...], Range(1, MAX_STEP_SESSIONS * (MAX_RUN + 1))]
    logits: FloatRows


@dataclass(frozen=True, slots=True)
class VerdictItem:
    """One session's verdict: tokens to commit, the first n_accepted of them proposed by the draft.

    full_rows: how many rows had to travel whole. finish: why the generation ends with these tokens, or empty.
    resync: the sampler does not hold this session as of `start` (it restarted): open it again and ask once more.
    """

    session: U64
    tokens: Run
    n_accepted: Annotated[int, Range(0, MAX_RUN + 1)]
    finish: FinishReason = ""
    full_rows: U32 = 0
    resync: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Sampler -> verifier: answer to Verify, items in its order. sample_us: time spent deciding."""

    step: U64
    items: Annotated[tuple[VerdictItem, ...], Range(1, MAX_STEP_SESSIONS)]
    sample_us: Micros = 0


# --- Operations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GetStatus:
    """CLI or gateway -> router, CLI -> tokenizer or sampler: what is going on?"""

    ref: U64


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """Tokenizer or sampler -> CLI: it is there. n_held: long texts that wait, or sessions. about: the vocabulary."""

    ref: U64
    service: Name
    version: Name
    uptime_s: U32
    n_held: U32
    about: Name = ""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Times since the router's start, by the bounds of `shared/histograms.py`, the last count being of what is longer.

    Empty: nothing was observed.
    """

    counts: Annotated[tuple[Count, ...], Range(0, 32)] = ()
    sum_us: Micros = 0


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """A peer as the router sees it. rtt_us: measured by Ping, 0 until known.

    alive: neither draining nor demoted, nor a draft worker that an operator has drained. n_steps, n_step_sessions: of a
    verifier, as of its last `StepReport`.
    """

    role: Role
    instance: Name
    engine: Name
    model: Name
    vocab_fingerprint: Name
    n_vocab: VocabSize
    n_ctx: Position
    n_slots: U32
    n_sessions: U32
    row_invariant: bool
    rtt_us: Micros
    alive: bool
    version: Name = ""
    uptime_s: U32 = 0
    n_steps: Count = 0
    n_step_sessions: Count = 0


WorkerState = Literal["ok", "probation", "demoted", "away", "drained", "banned"]
Order = Literal["", "drain", "ban", "pin"]
"""What an operator has ordered about a draft worker: no sessions; not even a connection; all new sessions."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A draft worker as the router judges it, of those there were since the router started or that an order names.

    state: "ok"; "demoted": kept out for `reason`, for retry_ms more if it is there all the time; "probation": it gets
    one session to prove itself; "away": not registered now; "drained", "banned": an operator keeps it out. token_us:
    time of a token of one session, with the sessions it has. prefill_per_s: prompt tokens. acceptance: of a proposal,
    given that those before it were right, by n_judged of them. speed_up: expected tokens/s with it, relative to plain
    decoding, for one session more. order: an operator's. there: registered now. round_trip: of pings. token: of drafted
    tokens, as it says itself. reply: from a commit that contradicts it to its next proposal.
    """

    instance: Name
    engine: Name
    model: Name
    state: WorkerState
    reason: Sentence
    retry_ms: U32
    n_demotions: U32
    n_sessions: U32
    n_slots: U32
    rtt_us: Micros
    token_us: Micros
    prefill_per_s: U32
    acceptance: Annotated[float, Range(0, 1)]
    n_judged: U32
    speed_up: Annotated[float, Range(0, 1e6)]
    order: Order = ""
    there: bool = False
    round_trip: Histogram = field(default_factory=Histogram)
    token: Histogram = field(default_factory=Histogram)
    reply: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """A generation in progress. worker: who drafts for it, empty for plain decoding. why: the choice in words.

    acceptance: of this worker's proposals here. speed_up: expected when it was chosen, relative to plain decoding.
    pin: the worker that an operator wants for it.
    """

    session: U64
    verifier: Name
    worker: Name
    why: Sentence
    n_tokens: Position
    n_moves: U32
    acceptance: Annotated[float, Range(0, 1)]
    speed_up: Annotated[float, Range(0, 1e6)]
    pin: Name = ""


@dataclass(frozen=True, slots=True)
class Totals:
    """All generations since the router's start. n_tokens: committed; n_accepted: those that drafts had proposed.

    n_ended: in good order, cancelled ones included. n_failed: with an error. n_drafted: tokens that workers proposed.
    """

    n_opened: Count = 0
    n_ended: Count = 0
    n_failed: Count = 0
    n_tokens: Count = 0
    n_accepted: Count = 0
    n_drafted: Count = 0


@dataclass(frozen=True, slots=True)
class Status:
    """Router -> CLI or gateway. sessions: the oldest 1,024."""

    ref: U64
    version: Name
    uptime_s: U32
    n_sessions: U32
    peers: Annotated[tuple[PeerStatus, ...], Range(0, 1024)]
    workers: Annotated[tuple[WorkerStatus, ...], Range(0, 1024)] = ()
    sessions: Annotated[tuple[SessionStatus, ...], Range(0, 1024)] = ()
    totals: Totals = field(default_factory=Totals)


@dataclass(frozen=True, slots=True)
class OrderWorker:
    """CLI -> router: an operator's order about a draft worker; "allow" takes back the one there is.

    session: pin this one only; 0: new sessions. Answered by `Ordered`, or by `Error` with this ref.
    """

    ref: U64
    worker: Name
    order: Literal["drain", "ban", "pin", "allow"]
    session: U64 = 0


@dataclass(frozen=True, slots=True)
class Ordered:
    """Router -> CLI: it is done. n_moved: sessions that changed their worker at once. kept: a restart of the router
    will not undo it. note: what stands in the way of it, or empty.
    """

    ref: U64
    n_moved: U32
    kept: bool
    note: Sentence = ""


@dataclass(frozen=True, slots=True)
class GetExplanation:
    """CLI -> router -> verifier: why did steps verify so many proposals? session 0: the one opened last."""

    ref: U64
    session: U64


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What a step decided for one session, and on what grounds.

    position: of the first token that the step decided. waited_us: for proposals, after the step before. reach: of each
    proposal that was there and might be verified, the expected probability that it and all before it are accepted.
    length: proposals verified. n_accepted: of these. rows: of the step, of all n_sessions of it. rate: tokens/s that
    were reached lately, the price of time. step_us: expected of the step with these rows; further_us: with one more;
    took_us: it really took.
    """

    position: Position
    waited_us: Micros
    reach: Annotated[tuple[float, ...], Range(0, MAX_RUN)]
    length: Annotated[int, Range(0, MAX_RUN)]
    n_accepted: Annotated[int, Range(0, MAX_RUN)]
    n_sessions: U32
    rows: U32
    rate: Annotated[float, Range(0, 1e9)]
    step_us: Micros
    further_us: Micros
    took_us: Micros


@dataclass(frozen=True, slots=True)
class Explanation:
    """Verifier -> router -> CLI: the last decisions for a session, oldest first; none: it is not known (any more).

    adaptive: lengths were chosen; otherwise all proposals that were there were verified. speculation: the bounds.
    """

    ref: U64
    session: U64
    adaptive: bool
    speculation: Speculation
    decisions: Annotated[tuple[StepDecision, ...], Range(0, 4096)]


@dataclass(frozen=True, slots=True)
class GetTrace:
    """What was recorded of a session? CLI -> router -> those that worked on it; CLI -> tokenizer or sampler.

    session: its id, 0: to the router the one opened last, to others none; to a gateway the number of its request, under
    which it records. since_ns, until_ns: by the answerer's clock, the time of which marks of no session are wanted, as
    are those in the time of the session's own.
    """

    ref: U64
    session: U64
    since_ns: ClockNanos = 0
    until_ns: ClockNanos = 0


@dataclass(frozen=True, slots=True)
class ClockEstimate:
    """At at_ns of the router's clock a peer's was ahead by offset_ns, with an error of at most uncertainty_ns."""

    at_ns: OffsetNanos
    offset_ns: OffsetNanos
    uncertainty_ns: ClockNanos


@dataclass(frozen=True, slots=True)
class TraceSource:
    """Who worked on a session. missing: why it cannot be asked, or empty. clock: estimates, oldest first."""

    role: Name
    instance: Name
    missing: Sentence
    clock: Annotated[tuple[ClockEstimate, ...], Range(0, 256)] = ()


@dataclass(frozen=True, slots=True)
class TraceSources:
    """Router -> CLI, first answer to GetTrace; a `Trace` of each source that is not missing follows, in any order.

    session: its id. sources: none: the session is not known (any more); otherwise the router itself is the first.
    """

    ref: U64
    session: U64
    sources: Annotated[tuple[TraceSource, ...], Range(0, MAX_SOURCES)]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one process recorded (`shared/trace.py`). clock: equal where two processes read the same clock, or empty.

    now_ns: its clock. kinds: the marks' names. threads: names. marks: [n, 9] int64, by their ends: begin and duration
    in nanoseconds of its clock, index in kinds, index in threads, 1 if it is of the session and 0 if of none, position,
    and the mark's three numbers. n_cut: older ones left out of this message. oldest_ns: 0, or, if older marks were
    overwritten, the begin of the oldest there is.
    """

    ref: U64
    role: Name
    instance: Name
    pid: U32
    host: Name
    clock: Name
    now_ns: ClockNanos
    kinds: Annotated[tuple[Name, ...], Range(0, 256)]
    threads: Annotated[tuple[Name, ...], Range(0, 4096)]
    marks: MarkRows
    n_cut: U32
    oldest_ns: ClockNanos


Message = (
    Hello | Welcome | Ping | Pong | Goodbye | Error
    | Describe | Description | Encode | Encoded | Decode | Decoded
    | Generate | Cancel | Tokens | Finished
    | OpenTarget | Close | Proposal | Commit | StepReport | OpenDraft
    | OpenSampling | CloseSampling | Verify | NeedRows | FullRows | Verdict
    | GetStatus | Status | ServiceStatus | OrderWorker | Ordered | GetExplanation | Explanation
    | GetTrace | TraceSources | Trace
)  # fmt: skip
