"""Which of several replicas a request goes to: one that likely holds its beginning, unless that has much more to do.

A replica's cost for a request is what it would have to do, in tokens (`Router.cost`); the request goes to the one of
least cost. A long common beginning therefore keeps requests together until their replica is so much busier than another
that computing the beginning once more there is less; from then on both hold it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from jax_engine.core.messages import CoreRequest
from jax_engine.core.stats import EngineStats
from jax_engine.kv_cache.page_hashes import digest_function, prompt_hashes
from jax_engine.lora_request import LoRARequest

# A token that has to be computed counts as this many that are held: about what a token costs to compute against what
# reading its keys and values takes in the few hundred steps of an answer, where decoding is bound by memory.
COMPUTED_TOKENS = 2
SEQUENCE_TOKENS = 128  # a sequence that runs, whatever its length: its own tokens are computed too
WAITING_SEQUENCES = 3  # so many more does one count that waits, as in vLLM's load balancing
ADAPTER_TOKENS = 512  # an adapter that has to be brought to the device, and may take another's place


@dataclass
class Replica:
    """What a front end knows of one replica. Mutable; owned by the `Router`.

    This front end's requests are known exactly, those of all front ends as of the latest report, with what was sent
    since. The larger of the two counts: a report may have been made before the latest request came.
    """

    num_pages: int
    page_size: int
    stats: EngineStats = field(default_factory=EngineStats)
    own_sequences: int = 0  # in flight
    own_tokens: int = 0  # that they hold beside what was there before
    num_reports: int = 0
    sent_sequences: int = 0  # since the report, and still in flight
    sent_tokens: int = 0
    pages: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # by hash, likely held, the oldest first
    adapters: OrderedDict[LoRARequest, None] = field(default_factory=OrderedDict)  # likely on the device

    @property
    def sequences(self) -> int:
        """In flight, running or waiting."""
        return max(self.own_sequences, self.stats.num_running + self.stats.num_waiting + self.sent_sequences)

    @property
    def held_tokens(self) -> int:
        """Room of the pages in use."""
        return max(self.own_tokens, self.stats.num_pages_in_use * self.page_size + self.sent_tokens)

    @property
    def load(self) -> int:
        """What it has to do, in tokens held."""
        waiting = WAITING_SEQUENCES * self.stats.num_waiting
        return self.held_tokens + SEQUENCE_TOKENS * (self.sequences + waiting)

    def num_known(self, hashes: Sequence[bytes]) -> int:
        """How many pages from the first are likely held."""
        for count, page_hash in enumerate(hashes):
            if page_hash not in self.pages:
                return count
        return len(hashes)

    def remember(self, hashes: Sequence[bytes]) -> None:
        """Pages are given up as the block pool does: the least recently used first, and a prompt's last before its
        first.
        """
        for page_hash in reversed(hashes):
            self.pages[page_hash] = None
            self.pages.move_to_end(page_hash)
        while len(self.pages) > self.num_pages:
            self.pages.popitem(last=False)


@dataclass(frozen=True)
class Sent:
    """Where a sequence is, and the tokens that it holds there beside what was there before."""

    replica: int
    num_tokens: int
    num_reports: int  # of the replica, before


class Router:
    """Chooses replicas. Mutable; owned by one front end, whose requests it sees, and the replicas' reports."""

    def __init__(
        self, num_pages: Sequence[int], page_size: int, *, max_adapters: int = 1, max_sequences: int | None = None
    ) -> None:
        """`num_pages` of each replica; adapters on the device of one, and sequences in flight that it may have (None:
        any number).
        """
        self.replicas = [Replica(count, page_size) for count in num_pages]
        self._page_size = page_size
        self._max_adapters = max_adapters
        self._max_sequences = max_sequences
        self._digest = digest_function("xxhash")  # a collision would send a request to another replica, and no more
        self._count = 0
        self._sent: dict[str, Sent] = {}

    def route(self, requests: Sequence[CoreRequest]) -> int:
        """The replica for sequences that belong together, as those of one prompt do; they count there until `ended`."""
        first = requests[0]
        prompt = first.prompt_token_ids
        hashes = prompt_hashes(prompt, self._page_size, salt=first.cache_salt, lora=first.lora, digest=self._digest)
        self._count += 1
        # Among equals: front ends, which do not know of one another, choose alike for a beginning that is new to them.
        start = int.from_bytes(hashes[0][:8], "little") if hashes else self._count
        count = len(self.replicas)

        def key(number: int) -> tuple[bool, int, int]:
            cost = self.cost(number, len(prompt), hashes, first.lora)
            return self._is_full(number, len(requests)), cost, (number - start) % count

        chosen = min(range(count), key=key)
        self._send(chosen, requests, hashes)
        return chosen

    def cost(self, number: int, num_tokens: int, hashes: Sequence[bytes], lora: LoRARequest | None = None) -> int:
        """What a replica would have to do with a prompt and all it has, in tokens. Tokens beyond its pages cost twice:
        they are in the way of others', which are computed again.
        """
        replica = self.replicas[number]
        new = num_tokens - self._page_size * replica.num_known(hashes)
        excess = max(0, replica.held_tokens + new - replica.num_pages * self._page_size)
        adapter = ADAPTER_TOKENS if lora is not None and lora not in replica.adapters else 0
        return replica.load + new + COMPUTED_TOKENS * (new + excess) + adapter

    def place_of(self, request_id: str) -> int | None:
        """The replica that has a sequence; None when none has."""
        sent = self._sent.get(request_id)
        return None if sent is None else sent.replica

    def ended(self, request_id: str) -> None:
        """A sequence is not in flight any more; one that is unknown is ignored."""
        if (sent := self._sent.pop(request_id, None)) is not None:
            replica = self.replicas[sent.replica]
            replica.own_sequences -= 1
            replica.own_tokens -= sent.num_tokens
            if sent.num_reports == replica.num_reports:
                replica.sent_sequences -= 1
                replica.sent_tokens -= sent.num_tokens

    def report(self, number: int, stats: EngineStats) -> None:
        """Take what a replica says of itself."""
        replica = self.replicas[number]
        replica.stats = stats
        replica.num_reports += 1
        replica.sent_sequences = replica.sent_tokens = 0

    def forget_prefixes(self) -> None:
        """No replica holds anything that is not in use."""
        for replica in self.replicas:
            replica.pages.clear()

    def _is_full(self, number: int, num_sequences: int) -> bool:
        limit = self._max_sequences
        return limit is not None and self.replicas[number].sequences + num_sequences > limit

    def _send(self, number: int, requests: Sequence[CoreRequest], hashes: Sequence[bytes]) -> None:
        replica = self.replicas[number]
        new = len(requests[0].prompt_token_ids) - self._page_size * replica.num_known(hashes)
        for place, request in enumerate(requests):
            tokens = new if place == 0 else 0  # the others share its pages
            self._sent[request.request_id] = Sent(number, tokens, replica.num_reports)
            replica.own_tokens += tokens
            replica.sent_tokens += tokens
        replica.own_sequences += len(requests)
        replica.sent_sequences += len(requests)
        replica.remember(hashes)
        if (lora := requests[0].lora) is not None:
            replica.adapters[lora] = None
            replica.adapters.move_to_end(lora)
            while len(replica.adapters) > self._max_adapters:
                replica.adapters.popitem(last=False)
