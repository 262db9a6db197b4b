"""Requests that begin with one prompt, such as the `n` completions of a call: one computes it, the others share it."""

from dataclasses import dataclass, field

from jax_engine.scheduling.request import Request


@dataclass(eq=False, slots=True)
class PromptGroup:
    """The requests of one prompt that have not ended. Mutable; owned by `PromptGroups`."""

    prompt: list[int]
    num_members: int = 0
    leader: Request | None = None  # computes the prompt, or is about to
    held: list[Request] = field(default_factory=list)  # wait for the leader, outside the waiting queue
    ready: list[Request] = field(default_factory=list)  # had the prompt in their pages when this step was begun


class PromptGroups:
    """Lets one request of a group compute the prompt while the others wait. Mutable; owned by the `Scheduler`.

    A prompt is shared from the step after the one that ends it: rows of one step do not wait for each other. A group
    whose members have all lost their pages begins again with one leader.
    """

    def __init__(self) -> None:
        self._groups: dict[str, PromptGroup] = {}
        self._starting: list[Request] = []  # took their pages and have not got through the prompt yet
        self._leaderless: list[PromptGroup] = []  # have lost their leader since the last step was begun
        self.num_held = 0

    def add(self, request: Request) -> None:
        """Take note of a new request."""
        name, prompt = request.asked.prompt_group, request.asked.prompt_token_ids
        if name is not None:
            group = self._groups.setdefault(name, PromptGroup(prompt))
            assert group.prompt == prompt, f"requests of the group {name} differ in their prompts"
            group.num_members += 1

    def discard(self, request: Request) -> bool:
        """Forget a request that ends; whether it was held."""
        group = self._group(request)
        if group is None:
            return False
        group.num_members -= 1
        if group.num_members == 0:
            del self._groups[request.asked.prompt_group or ""]
        self._end_lead(group, request)
        if request in group.ready:
            group.ready.remove(request)
        was_held = request in group.held
        if was_held:
            group.held.remove(request)
            self.num_held -= 1
        return was_held

    def begin_step(self) -> list[Request]:
        """See whose prompts the launched steps have computed; the held requests that this lets go, by arrival."""
        running = [request for request in self._starting if request.slot >= 0]
        self._starting = [request for request in running if request.num_computed < request.num_prompt]
        for request in running:
            if request.num_computed >= request.num_prompt and (group := self._group(request)) is not None:
                group.ready.append(request)
                self._end_lead(group, request)
        released: list[Request] = []
        for group in self._leaderless:
            released += group.held
            group.held.clear()
        self._leaderless.clear()
        self.num_held -= len(released)
        return sorted(released, key=lambda request: request.order)

    def holds(self, request: Request) -> bool:
        """Whether a request that could start must wait for its prompt, and is held from now on; otherwise it leads its
        group, or shares from a `donor`.
        """
        group = self._group(request)
        if group is None or self.donor(request) is not None:
            return False
        if group.leader is None or group.leader is request:
            group.leader = request
            return False
        group.held.append(request)
        self.num_held += 1
        return True

    def donor(self, request: Request) -> Request | None:
        """A running request whose pages hold this one's prompt; None when there is none."""
        group = self._group(request)
        return next((other for other in group.ready if other.slot >= 0), None) if group is not None else None

    def started(self, request: Request) -> None:
        """A request has taken a slot."""
        group = self._group(request)
        if group is not None:
            if request in group.ready:  # preempted since
                group.ready.remove(request)
            self._starting.append(request)

    def _end_lead(self, group: PromptGroup, request: Request) -> None:
        if group.leader is request:
            group.leader = None
            self._leaderless.append(group)

    def _group(self, request: Request) -> PromptGroup | None:
        name = request.asked.prompt_group
        return self._groups[name] if name is not None else None
