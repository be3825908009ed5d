"""The front end of a simulated world, its requests, and the steps of the model that make their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastic_daemon import protocol as p
from elastic_daemon.membership import Status
from tests.unit.invariants import SERVING, Process

if TYPE_CHECKING:
    from tests.unit.simulation import World

STEP = 0.25  # between two steps of the model


@dataclass(eq=False)
class SimulatedFrontend:
    ready: bool = False
    view: p.Snapshot | None = None
    in_step: int = 0  # the epoch
    owner: dict[int, p.Identity] = field(default_factory=dict)


class Serving:
    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        self.frontend: SimulatedFrontend | None = None
        self.next_request = 0
        self.tokens = 0  # accepted as delivered

    def on_frontend_up(self, frontend: SimulatedFrontend) -> None:
        world = self.world
        if frontend is self.frontend:
            frontend.ready = True
            world.tell(p.FrontendReady())

    def frontend_dies(self) -> None:
        world = self.world
        if self.frontend is not None:
            self.frontend = None
            for process in world.processes.values():
                process.requests.clear()  # nobody is left to hear of them
            world.later(world.soon(), world.tell, p.FrontendExited("signal 9"))

    def on_publish(self, view: p.Snapshot) -> None:
        world = self.world
        world.published = view
        frontend = self.frontend
        if frontend is None or not frontend.ready:
            return
        frontend.view = view
        if view.status in SERVING:
            moved = [request for request, owner in frontend.owner.items() if owner not in self.takers(view)]
            for request in moved:
                if process := world.process_of(frontend.owner[request]):
                    process.requests.discard(request)
                self.assign(frontend, request)
            if view.draining and not world.happens(5):
                gone = tuple(incarnation for _, incarnation in view.draining)
                world.later(world.soon(), world.tell, p.FrontendMoved(view.epoch, gone))
            if view.epoch != frontend.in_step and not world.happens(2):
                frontend.in_step = view.epoch
                synced = p.FrontendSynced(view.epoch, len(frontend.owner) - len(moved), len(moved), 0, 0, self.tokens)
                world.later(self.rng.uniform(0.5, 2.0) if world.happens(2) else world.soon(), world.tell, synced)
            if world.happens(5):
                world.later(world.soon(), world.tell, p.FrontendSynced(view.epoch - 1, 0, 0, 0, 0, 0))  # long overdue
        elif view.status is Status.STOPPING and self.rng.random() < 0.7:
            world.later(self.rng.uniform(0.0, 3.0), world.tell, p.DrainComplete())
        elif not view.hold:
            frontend.owner.clear()
            for process in world.processes.values():
                process.requests.clear()

    @staticmethod
    def takers(view: p.Snapshot) -> tuple[p.Identity, ...]:
        """Who takes requests."""
        return tuple(identity for identity in view.active if identity not in view.draining) or view.active

    def assign(self, frontend: SimulatedFrontend, request: int) -> None:
        world = self.world
        assert frontend.view is not None
        owner = self.rng.choice(self.takers(frontend.view))
        frontend.owner[request] = owner
        if process := world.process_of(owner):
            process.requests.add(request)

    def step(self) -> None:
        """One step of the model, if every member of the group is in it."""
        world = self.world
        world.later(STEP, self.step)
        frontend = self.frontend
        if frontend and frontend.view and frontend.view.status in SERVING and len(frontend.owner) < 6:
            self.next_request += 1
            self.assign(frontend, self.next_request)
        for epoch in list(world.members)[-2:]:
            group = [peer for identity in world.members[epoch] if (peer := world.process_of(identity))]
            whole = len(group) == len(world.members[epoch])
            if whole and all(peer.works and peer.mode == "stepping" and peer.epoch == epoch for peer in group):
                if world.poison.spoils(group):
                    for peer in self.rng.sample(group, self.rng.randint(1, len(group))):
                        world.fault(peer, "poison")
                    continue
                self.move_experts(group)
                self.respread(group)
                for peer in group:
                    if peer.requests:
                        world.later(world.soon(), self.on_output, peer, epoch, tuple(peer.requests))
                        world.background += 1

    def move_experts(self, group: list[Process]) -> None:
        """The load balancer of the engine swaps two experts; the controller may not be told."""
        world = self.world
        one, other = self.rng.choice(group), self.rng.choice(group)
        layer, slot, place = self.rng.randrange(world.layers), *(self.rng.randrange(world.policy.slots) for _ in "ab")
        row, column = one.column[layer], other.column[layer]
        row[slot], column[place] = column[place], row[slot]
        if self.rng.random() < 0.5:
            for peer in dict.fromkeys((one, other)):  # in an order that a seed gives again
                world.say(peer, p.ColumnChanged(*peer.identity, peer.epoch, peer.frozen_column))

    def respread(self, group: list[Process]) -> None:
        """Once all know of a move, it is made; some layers only, when a fence comes between."""
        world = self.world
        moves = [peer.move for peer in group if peer.move is not None]
        if len(moves) < len(group) or len({move.serial for move in moves}) > 1:
            return
        layers = self.rng.randint(0, world.layers) if world.happens(5) else world.layers
        for peer, move in zip(group, moves, strict=True):
            for layer in range(layers):
                peer.column[layer] = move.placement.columns[peer.rank][layer].tolist()
            if layers == world.layers:
                peer.move = None
                column = peer.frozen_column
                world.say(peer, p.RankRespread(*peer.identity, peer.epoch, move.serial, column, 0.01, 1))

    def on_output(self, process: Process, epoch: int, requests: tuple[int, ...]) -> None:
        world = self.world
        world.background -= 1
        frontend = self.frontend
        if frontend is None or frontend.view is None:
            return
        view = frontend.view
        if view.status not in (*SERVING, Status.STOPPING) or epoch != view.epoch or process.identity not in view.active:
            return
        for request in requests:
            if frontend.owner.get(request) != process.identity:
                continue
            assert process.identity not in world.dead, f"a token of {process.identity}, excluded, was delivered"
            now = world.controller.epoch
            assert epoch == now, f"a token of epoch {epoch} was delivered in {now}"
            self.tokens += 1
            if self.rng.random() < 0.2:
                del frontend.owner[request]
                process.requests.discard(request)
