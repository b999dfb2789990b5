"""Tenants take turns by what they have used, whoever asks for more."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cloud_node.turns import Ticket, Turns
from isthmus.errors import NotKeptError
from tests.faults.training import wait_until

PATIENCE_S = 30


class Queue:
    """Requests that wait in the order in which they are made, and the order in which they are served."""

    def __init__(self) -> None:
        self.turns: Turns[str] = Turns()
        self.served: list[str] = []
        self._asked: list[Future[bool]] = []
        self._pool = ThreadPoolExecutor(64)
        self._free, self._held = threading.Event(), threading.Event()
        self._pool.submit(self._hold)
        assert self._held.wait(PATIENCE_S)

    def _hold(self) -> None:
        with self.turns.turn(Ticket("holder", "holder", 1.0)):
            self._held.set()
            assert self._free.wait(PATIENCE_S)

    def ask(self, name: str, tenant: str, cost: float = 1.0, job: str | None = None) -> "Future[bool]":
        def serve() -> bool:
            with self.turns.turn(Ticket(tenant, f"of {tenant}", cost, job)) as ours:
                self.served.append(name)
                return ours

        return self.wait(serve)

    def wait(self, serve: Callable[[], bool]) -> "Future[bool]":
        waiting = self.turns.waiting
        self._asked.append(self._pool.submit(serve))
        wait_until(lambda: self.turns.waiting == waiting + 1, "the request to wait")
        return self._asked[-1]

    def let_go(self) -> None:
        self._free.set()

    def serve_all(self) -> list[str]:
        self.let_go()
        for asked in self._asked:  # which may grow meanwhile
            asked.exception(PATIENCE_S)
        self._pool.shutdown()
        return self.served


def test_a_greedy_tenant_with_many_requests_keeps_another_waiting_for_one_of_them() -> None:
    queue = Queue()
    for number in range(30):
        queue.ask(f"greedy {number}", "greedy")
    for number in range(3):
        queue.ask(f"modest {number}", "modest")
    served = queue.serve_all()
    assert served[:6] == ["greedy 0", "modest 0", "greedy 1", "modest 1", "greedy 2", "modest 2"]
    assert served[6:] == [f"greedy {number}" for number in range(3, 30)]


def test_a_tenant_with_large_requests_has_as_much_of_the_device_and_not_as_many_turns() -> None:
    queue = Queue()
    for number in range(4):
        queue.ask(f"large {number}", "large", cost=10.0)
    for number in range(30):
        queue.ask(f"small {number}", "small", cost=1.0)
    served = queue.serve_all()
    before = [
        sum(name.startswith("small") for name in served[: served.index(f"large {number}")]) for number in range(4)
    ]
    assert before == [0, 10, 20, 30]


def test_within_a_tenant_who_comes_first_is_served_first() -> None:
    queue = Queue()
    for number, cost in enumerate([5.0, 1.0, 3.0, 1.0]):
        queue.ask(str(number), "one", cost)
    assert queue.serve_all() == ["0", "1", "2", "3"]


def test_a_tenant_that_was_idle_takes_turns_from_now_on_and_makes_up_for_nothing() -> None:
    queue = Queue()
    for number in range(6):
        queue.ask(f"early {number}", "busy")

    def meet() -> bool:
        with queue.turns.turn(Ticket("busy", "busy", 1.0)):
            queue.served.append("the other comes")
            for number in range(3):
                queue.ask(f"idle {number}", "idle")
        return True

    queue.wait(meet)
    for number in range(3):
        queue.ask(f"busy {number}", "busy")
    served = queue.serve_all()
    after = served[served.index("the other comes") + 1 :]
    assert after == ["idle 0", "busy 0", "idle 1", "busy 1", "idle 2", "busy 2"]


def test_a_tenant_that_has_used_little_and_comes_again_has_no_credit_either() -> None:
    queue = Queue()
    queue.ask("idle before", "idle", cost=5.0)
    queue.ask("busy before", "busy", cost=10.0)

    def meet() -> bool:
        with queue.turns.turn(Ticket("busy", "busy", 10.0)):
            for number in range(3):
                queue.ask(f"idle {number}", "idle", cost=5.0)
        return True

    queue.wait(meet)
    queue.ask("busy", "busy", cost=10.0)
    assert queue.serve_all() == ["idle before", "busy before", "idle 0", "idle 1", "busy", "idle 2"]


def test_a_pass_that_waits_for_its_edge_lets_others_in_and_goes_on_before_its_tenants_next() -> None:
    queue = Queue()
    answered, paused = threading.Event(), threading.Event()

    def passing() -> bool:
        ticket: Ticket[str] = Ticket("ports", "ports", 1.0)
        with queue.turns.turn(ticket):
            queue.served.append("pass begins")
            with queue.turns.pause(ticket):
                paused.set()
                assert answered.wait(PATIENCE_S)
            queue.served.append("pass goes on")
        return True

    def blocking() -> bool:
        with queue.turns.turn(Ticket("other", "other", 1.0)):
            queue.served.append("other")
            assert paused.is_set()
            waiting = queue.turns.waiting
            answered.set()
            wait_until(lambda: queue.turns.waiting == waiting + 1, "the pass to wait again")
        return True

    queue.wait(passing)
    queue.wait(blocking)
    queue.ask("next of ports", "ports")
    assert queue.serve_all() == ["pass begins", "other", "pass goes on", "next of ports"]


def test_a_flood_of_passes_that_go_on_keeps_a_newcomer_waiting_for_one_of_them() -> None:
    queue = Queue()
    passes, answered, all_paused = 8, threading.Event(), threading.Semaphore(0)

    def passing(number: int) -> bool:
        ticket: Ticket[str] = Ticket("ports", "ports", 1.0)
        with queue.turns.turn(ticket):
            with queue.turns.pause(ticket):
                all_paused.release()
                assert answered.wait(PATIENCE_S)
            queue.served.append("pass goes on")
        return True

    def come() -> bool:
        with queue.turns.turn(Ticket("early", "early", 1.0)):
            answered.set()
            wait_until(lambda: queue.turns.waiting == passes, "all passes to wait again")
            queue.ask("newcomer", "new")
        return True

    for number in range(passes):
        queue.wait(lambda number=number: passing(number))
    queue.let_go()
    for _ in range(passes):
        assert all_paused.acquire(timeout=PATIENCE_S)
    come()
    assert queue.serve_all().index("newcomer") <= 1


def test_only_the_heads_of_lines_are_joined_in_fair_order() -> None:
    queue = Queue()
    joined: list[str] = []

    def take(job: str) -> bool:
        if len(joined) < 4:
            joined.append(job)
            return True
        return False

    def leading() -> bool:
        with queue.turns.turn(Ticket("leader", "leader", 1.0)):
            queue.served.append("leader")
            with queue.turns.join(take) as others:
                assert len(others) == 4
        return True

    queue.wait(leading)
    for number in range(5):
        queue.ask(f"many {number}", "many", job=f"many {number}")
    queue.ask("not to be joined", "other")
    queue.ask("behind it", "other", job="behind it")
    few = queue.ask("few 0", "few", job="few 0")
    queue.serve_all()
    assert joined == ["many 0", "few 0", "many 1", "many 2"]
    assert few.result(PATIENCE_S) is False


def test_those_that_joined_what_failed_wait_again_and_have_the_device_each_by_itself() -> None:
    queue = Queue()

    def leading() -> bool:
        with queue.turns.turn(Ticket("leader", "leader", 1.0)):
            try:
                with queue.turns.join(lambda _: True) as others:
                    assert len(others) == 3
                    raise RuntimeError("too many")
            except RuntimeError:
                return True
        return False

    led = queue.wait(leading)
    asked = [queue.ask(f"{tenant}", tenant, job=tenant) for tenant in "abc"]
    assert queue.serve_all() == ["a", "b", "c"]
    assert led.result(PATIENCE_S)
    assert all(one.result(PATIENCE_S) for one in asked)
    assert queue.turns.waiting == 0


def test_a_request_whose_session_is_closed_waits_no_longer() -> None:
    queue = Queue()
    gone, stays = queue.ask("gone", "closed"), queue.ask("stays", "other")
    queue.turns.dismiss("of closed")
    with pytest.raises(NotKeptError, match="closed"):
        gone.result(PATIENCE_S)
    assert queue.turns.waiting == 1
    assert queue.serve_all() == ["stays"]
    assert stays.result(PATIENCE_S)
