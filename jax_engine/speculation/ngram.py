"""Prompt lookup (Saxena 2023): what followed a sequence's latest tokens when it had them before may follow again."""

from jax_engine.scheduling.request import Request

TOKENS_A_CALL = 512  # of a prompt, that `learn` takes in at once: a long one takes several calls, not one long step
MAX_CANDIDATES = 8  # earlier places that are compared, the latest first


class NgramHistory:
    """One request's tokens, and where the latest of them have stood before. Mutable; owned by the `NgramProposer`.

    A token costs one entry of a dictionary, and a comparison while the place that is followed goes on to agree; only
    once it does not is another looked up.
    """

    __slots__ = ("_indexed", "_latest", "_longest", "_previous", "_seen", "_shortest", "match", "place", "request")

    def __init__(self, request: Request, *, shortest: int, longest: int) -> None:
        """Look for places that agree in `shortest` tokens at least, and best in `longest`."""
        self.request = request
        self._shortest, self._longest = shortest, longest
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram of `shortest` tokens -> the place after its latest one
        self._previous: list[int] = []  # for each place from `shortest` on: the one before it after a like n-gram
        self._indexed = shortest  # places below it are in the index
        self._seen = 0  # tokens that `place` is right for
        self.place = -1  # of the token that is taken for the next one; -1: none
        self.match = 0  # tokens before it that agree with the latest ones

    def learn(self) -> list[tuple[int, bool]]:
        """Take in the request's new tokens; for each of them that was foreseen, rightly or not, with what `match`."""
        tokens = self.request.tokens
        outcomes = []
        for index in range(self._seen, len(tokens)) if self._seen else ():
            if self.place < 0:
                break
            is_right = tokens[self.place] == tokens[index]
            outcomes.append((self.match, is_right))
            if is_right:
                self.place, self.match = self.place + 1, self.match + 1
            else:
                self.place = -1
        self._seen = len(tokens)
        self._index(tokens)
        if self.place < 0:
            self._look_up(tokens)
        return outcomes

    def propose(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may come next. Those of a place near the end repeat themselves."""
        if self.place < 0:
            return []
        tokens, place = self.request.tokens, self.place
        drafts = tokens[place : place + limit]
        while len(drafts) < limit:
            drafts.append(drafts[place + len(drafts) - len(tokens)])
        return drafts

    def _index(self, tokens: list[int]) -> None:
        """The latest n-gram waits: nothing follows it yet."""
        shortest, latest = self._shortest, self._latest
        for place in range(self._indexed, min(len(tokens), self._indexed + TOKENS_A_CALL)):
            gram = tuple(tokens[place - shortest : place])
            self._previous.append(latest.get(gram, -1))
            latest[gram] = place
            self._indexed = place + 1

    def _look_up(self, tokens: list[int]) -> None:
        """Of the latest places after a like n-gram, the one with the longest, and the latest of equals."""
        shortest, count = self._shortest, len(tokens)
        self.match = 0
        if count < shortest:
            return
        candidate = self._latest.get(tuple(tokens[count - shortest :]), -1)
        for _ in range(MAX_CANDIDATES):
            if candidate < 0 or self.match >= self._longest:
                return
            match, most = shortest, min(self._longest, candidate)
            while match < most and tokens[candidate - match - 1] == tokens[count - match - 1]:
                match += 1
            if match > self.match:
                self.place, self.match = candidate, match
            candidate = self._previous[candidate - shortest]
