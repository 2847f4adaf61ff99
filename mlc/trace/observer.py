"""The observer: a recorder under which the user's function really runs.

Every operator runs as eager PyTorch runs it, on the user's own tensors; what it computed becomes an equation.  Whether
a tensor carries a derivative, what a leaf is, what ``.grad`` holds are PyTorch's own answers, never an imitation.  A
value is found by the memory that a tensor lies in and where it lies there (:mod:`mlc.record.memories`), so views,
flat vectors, ``.data`` and rebound parameters mean what they mean in eager.

What was written is kept as it was before its first write, so that the program can be run from the same state, and so
that a call that fails leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from mlc.errors import CaptureError
from mlc.ir.core import Alias, Draw, Eqn, Random, Var
from mlc.ir.inplace import functional_variant, schema_of
from mlc.ir.trees import each_tensor, flatten, map_tensors
from mlc.ir.types import Loc, TensorType
from mlc.record.handles import Handle, Storage
from mlc.record.memories import Layout, Memories, Memory, layout_of
from mlc.trace.cuts import Cuts
from mlc.trace.grads import get_grad
from mlc.trace.numberlinks import Linked
from mlc.trace.randomness import RandomWatch, key_of
from mlc.trace.snapshots import Snapshots
from mlc.trace.tracer import External, Tracer

__all__ = ["Observer"]

_A: Any = torch.ops.aten
_BASE: Any = torch._C.TensorBase


class Observer(Cuts, Tracer):
    """Records one real run of the user's function.

    Args:
        paths: Place of every tensor of the user's, by identity.
        tensors: These tensors.
    """

    real = True

    def __init__(self, paths: dict[int, tuple[Any, ...]], tensors: Sequence[Tensor] = (),
                 generators: Sequence[torch.Generator] = ()) -> None:  # fmt: skip
        Tracer.__init__(self, paths)
        Cuts.__init__(self)
        self.memories = Memories()
        self.generators = {0, *map(key_of, generators)}
        self.snapshots = Snapshots()
        self.paused = 0
        self.written_out: Any = WeakIdKeyDictionary()  # sparse matrices as dense ones
        self.unplaced: list[Loc | None] = []  # data from outside that no later call could find again
        self.frozen: list[tuple[str, Loc | None]] = []  # results taken as data: what, where
        self.outer_nodes: set[Any] = set()  # of graphs that were there before the call
        self.leaf_values: Any = WeakIdKeyDictionary()  # leaves that share a memory with what they were cut from
        self.trail: dict[Var, Tensor] | None = {} if os.environ.get("MLC_TRAIL") else None  # what the run computed
        self.files: list[Loc | None] = []  # where the loop writes files
        self.retained: Any = WeakIdKeyDictionary()  # results that retain_grad() was called on
        self.rebound: dict[int, Tensor] = {}  # tensors whose .data was set
        self.gradients: Any = None
        self.reads: Any = None
        self.ended = False
        self.hooked_grads: dict[Var, CaptureError] = {}  # gradients that hooks of the user's saw
        self.grads_seen: set[int] = set()  # tensors whose .grad from before the call Python looked at
        self.target: Tensor | None = None  # what an in-place operator writes
        self.refusal: CaptureError | None = None  # the first one: it stands, whatever the user's code does with it
        self.initial_grads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.random = RandomWatch()
        self.random_is_data = False
        self.item_states: dict[tuple[int, int, int], Tensor] = {}
        self.drawn_items: dict[tuple[int, int], list[list[Tensor]]] = {}
        self.reordered = False
        self._opened: dict[tuple[int, int], Tensor] = {}
        self.dropped: dict[Var, Any] = {}  # gradients that pass no update, as in PyTorch, where more was there to follow
        self._ghosts: dict[TensorType, FakeTensor] = {}
        self._places: dict[tuple[int, Layout], tuple[Any, ...]] = {}
        for t in tensors:
            path = paths.get(id(t))
            if path is not None and t.layout is torch.strided and not torch.nn.parameter.is_lazy(t):
                self._places.setdefault((t.untyped_storage()._cdata, layout_of(t)), path)

    # ---- dispatch

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Operators run unseen."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except CaptureError as e:
            self.refusal = self.refusal or e
            raise

    def dispatch(self, func: Any, s: Any, special: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator and record it."""
        self.notice_mode()
        if any(map(torch.nn.parameter.is_lazy, _tensors(args, kwargs))):
            return func(*args, **kwargs)  # of a lazy module: there is no value yet
        if torch.is_inference_mode_enabled():  # nothing took compound operators apart
            with self.active():
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if any(self._odd(t) for t in _tensors(args, kwargs)):
            found = self._sparse_product(func, args, kwargs)
            return self._freeze(func, args, kwargs) if found is None else found
        if s.random:
            return self._drawing(func, s, special, args, kwargs)
        return super().dispatch(func, s, SPECIAL_REAL.get(func, special), args, kwargs)

    def _drawing(self, func: Any, s: Any, special: Any, args: Any, kwargs: Any) -> Any:
        """A random operator: an equation while its generator goes on from where the last one left it, else data."""
        generator = kwargs.get("generator")
        known = generator is None or key_of(generator) in self.generators
        self.random_is_data = self.random_is_data or not known or not self.random.continues(generator)
        try:
            return super().dispatch(func, s, SPECIAL_REAL.get(func, special), args, kwargs)
        finally:
            self.random.left(generator)

    def constant(self, t: Tensor, beside: tuple[Tensor | None, ...]) -> Tensor:
        """As :meth:`Recorder.constant`: operators inside another one do not see that it is tracked."""
        if not self.tracks([b for b in beside if b is not None], {}):
            return t
        var = self.read(t, True)
        with self.pause():
            c = t.detach().clone()
        self.bind(c, var)
        return c

    def plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record an operator as it stands, whatever is special about it."""
        with self.pause():
            out = func(*args, **kwargs)
        return self._plain(func, schema_of(func), args, kwargs, out)

    @staticmethod
    def _odd(t: Tensor) -> bool:
        return t.layout is not torch.strided

    def twin(self, t: Tensor) -> FakeTensor:
        """A fake tensor of the same type: for questions about types."""
        if isinstance(t, FakeTensor):
            return t
        ty = TensorType.of(t)
        ghost = self._ghosts.get(ty)
        if ghost is None:
            with _disable_current_modes():
                ghost = self._ghosts[ty] = self.fakes.make(ty)
        return ghost

    fake_of = twin

    def _result(self, func: Any, s: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.dynamic_output_shape in func.tags and not self._known_size(func, args):
            return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _known_size(self, func: Any, args: Any) -> bool:
        return False

    def _plain(self, func: Any, s: Any, args: Any, kwargs: Any, out: Any) -> Any:
        if any(isinstance(o, Tensor) and self._odd(o) for o in flatten(out)):
            self._refuse_odd(args, kwargs, next(o for o in flatten(out) if isinstance(o, Tensor) and self._odd(o)))
            return self._as_data(func, args, kwargs, out)
        if torch.Tag.dynamic_output_shape in func.tags:
            if func is _A.index.Tensor:
                return self._masked(func, s, args, kwargs, out)
            return self._as_data(func, args, kwargs, out)
        if s.random and self.random_is_data:
            return self._as_data(func, args, kwargs, out)
        result = super()._plain(func, s, args, kwargs, out)
        if func is _A.clone.default and self.copying():
            self.copies.add(self.present(out))
        return result

    def _masked(self, func: Any, s: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """``x[mask]``: the places where the mask holds are data of this call."""
        indices: list[Any] = []
        for i in args[1]:
            if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8):
                with self.pause():
                    found = i.nonzero().unbind(1)
                for f in found:
                    self._data(f)
                self._note("a mask picks elements", i)
                indices += found
            else:
                indices.append(i)
        return super()._plain(func, s, (args[0], indices), kwargs, out)

    def _note(self, what: str, t: Tensor | None = None) -> None:
        self.frozen.append((what, self.place()))

    def _as_data(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Take what an operator gave as data of this call: right where no derivative goes through it.

        Raises:
            CaptureError: where one does.
        """
        for t in _tensors(args, kwargs):
            h = self.handle(t) if not self._odd(t) else None
            if h is not None and t.dtype.is_floating_point and self.value(h).mask:
                results = [o for o in flatten(out) if isinstance(o, Tensor)]
                if any(o.dtype.is_floating_point for o in results):
                    raise CaptureError(
                        f"the result of {func} has a size that depends on values that are differentiated",
                        loc=self.place(), advice="use torch.where or multiply by the mask instead of picking elements",
                    )  # fmt: skip
        for o in flatten(out):
            if isinstance(o, Tensor) and not self._odd(o):
                self._data(o)
        self._note(f"{func} is run anew")
        return out

    def _freeze(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on tensors that programs have no values for (sparse ones): data, where nothing is differentiated."""
        for t in _tensors(args, kwargs):
            if t.requires_grad and torch.is_grad_enabled():
                raise CaptureError(
                    f"a {t.layout} tensor that requires grad is used", loc=self.place(),
                    advice="convert it with .to_dense() before the call",
                )  # fmt: skip
        self._refuse_odd(args, kwargs, next(x for x in _tensors(args, kwargs) if self._odd(x)))
        return self._as_data(func, args, kwargs, func(*args, **kwargs))

    def _refuse_odd(self, args: Any, kwargs: Any, odd: Tensor) -> None:
        for t in _tensors(args, kwargs):
            if not self._odd(t) and t.dtype.is_floating_point and self.value(self.handle(t)).mask:
                raise CaptureError(
                    f"a {odd.layout} tensor is used", loc=self.place(),
                    advice="convert it with .to_dense() before the call",
                )  # fmt: skip

    def _sparse_product(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A sparse matrix of data times a dense one: the product with the matrix written out; None for anything else."""
        at = 0 if func is _A.mm.default else 1
        op = {_A.mm.default: func, _A.addmm.default: func, _A._sparse_addmm.default: _A.addmm.default}.get(func)
        if op is None or [self._odd(t) for t in args[: at + 2]] != [i == at for i in range(at + 2)]:
            return None
        if args[at].requires_grad:
            return None
        dense = self.written_out.get(args[at])
        with self.pause():
            out = func(*args, **kwargs)
            if dense is None:
                dense = self.written_out[args[at]] = args[at].to_dense()
                self._data(dense)
        return super()._plain(op, schema_of(op), (*args[:at], dense, *args[at + 1 :]), kwargs, out)

    def _data(self, t: Tensor) -> Handle:
        """A tensor that is data of this very call."""
        self.unplaced.append(self.place())
        return self._outside(t, self.memories.of(t), None)

    # ---- tensors

    def handle(self, t: Tensor) -> Handle:
        """The handle of any tensor."""
        mem = self.memories.find(t) if t.layout is torch.strided else None
        h = None if mem is None else mem.layouts.get(layout_of(t))
        return self.external(t) if h is None else h

    def external(self, t: Tensor) -> Handle:
        """A tensor, or a place in a memory, that was not met before."""
        if t.layout is not torch.strided:
            raise CaptureError(
                f"a {t.layout} tensor is used", loc=self.place(), advice="convert it with .to_dense() before the call"
            )
        mem = self.memories.of(t)
        if mem.roots and any(not self._pristine(r) for r in mem.roots):
            return self._relate(t, mem)
        path = self.paths.get(id(t)) or self._places.get((t.untyped_storage()._cdata, layout_of(t)))
        if path is None:
            self.unplaced.append(self.place())
        return self._outside(t, mem, path)

    @staticmethod
    def _pristine(r: Storage) -> bool:
        return r.external is not None and r.version == 0

    def _outside(self, t: Tensor, mem: Memory, path: tuple[Any, ...] | None) -> Handle:
        var = Var(TensorType.of(t))
        storage = Storage(var)
        h = mem.root(layout_of(t), storage)
        with self.pause():
            held = t.detach()
        ext = External(t, path, var, h, None, read=self.place(), held=held)
        storage.external = ext
        self.externals[len(self.externals)] = ext
        if t.requires_grad:
            self.new_bit(var)
            h.leaf = True
            storage.leaf = t.is_leaf
            if t.is_leaf:
                self.leaves[id(t)] = t
                self.seen_leaves[t] = True
            elif t.grad_fn is not None:
                self.outer_nodes.add(t.grad_fn)
        return h

    def _relate(self, t: Tensor, mem: Memory) -> Handle:
        """A place in a memory that changes: as a view of the root that covers it."""
        self.join(mem)
        (root,) = mem.roots
        at = next(lay for lay, h in mem.layouts.items() if h.storage is root and not h.chain)
        offset = t.storage_offset() - at[0]
        if offset < 0 or t.dtype != at[3]:
            raise CaptureError(
                "two tensors share memory in a way that cannot be followed", loc=self.place(),
                advice="give each a memory of its own with .clone()",
            )  # fmt: skip
        step = (_A.as_strided.default, (list(t.shape), list(t.stride()), offset), (), 0, [TensorType.of(t)], None)
        h = mem.layouts[layout_of(t)] = Handle(root, (step,))
        return h

    def join(self, mem: Memory) -> None:
        """One root for a memory that is about to be written: the whole of it, as it was before the call."""
        if len(mem.roots) < 2:
            return
        roots = {id(h.storage): (lay, h.storage) for lay, h in mem.layouts.items() if not h.chain}
        apart = [r for r in mem.roots if not isinstance(r.external, External) or r.version]
        if apart:
            raise CaptureError(
                "a memory that several tensors share is written, one of them drawn from an iterable", loc=self.place(),
                advice="draw copies (x.clone()), or write to a tensor of its own",
            )  # fmt: skip
        exts = [r.external for r in mem.roots]
        dtypes = {e.tensor.dtype for e in exts}
        if len(dtypes) > 1:
            raise CaptureError("tensors of several types share a memory that is written", loc=self.place())
        first: Tensor = exts[0].held
        n = first.untyped_storage().nbytes() // first.dtype.itemsize
        with self.pause(), torch.no_grad():
            whole = torch.empty(0, dtype=first.dtype, device=first.device).set_(first.untyped_storage(), 0, (n,), (1,))
        flat = Storage(Var(TensorType.of(whole)))
        ext = External(whole, None, flat.var, Handle(flat), None, read=exts[0].read, held=whole, parts=tuple(exts))
        flat.external = ext
        flat.updated = True
        self.externals[len(self.externals)] = ext
        mem.roots = [flat]
        olds = dict(mem.layouts)
        mem.layouts.clear()
        mem.layouts[layout_of(whole)] = Handle(flat)
        for lay, h in olds.items():
            base, _ = roots[id(h.storage)]
            mem.layouts[lay] = Handle(flat, (*_from_flat(whole, base), *h.chain))
        for lay, storage in roots.values():
            flat.leaf = flat.leaf or storage.leaf
            mem.layouts[lay].leaf = olds[lay].leaf
            storage.external.written = True

    def value(self, h: Handle) -> Var:
        """As :meth:`Values.value`; derived anew in every iteration, as the user's code does."""
        if h.chain:
            h.cached = None
        return super().value(h)

    def bind(self, t: Tensor, var: Var) -> Handle:
        """A fresh tensor holds ``var``."""
        if self.trail is not None:
            with self.pause():
                self.trail[var] = t.detach().clone()
        storage = Storage(var)
        storage.born = self.region()
        return self.memories.of(t).root(layout_of(t), storage)

    def wrap(self, t: Any, var: Var, *, taint: bool = False, origin: Loc | None = None) -> Any:
        """As :meth:`Values.wrap`."""
        self.bind(t, var)
        if not torch.is_grad_enabled():
            self.cut_vars[var] = origin or self.place()
        return t

    def fresh(self, var: Var, *, taint: bool = False) -> Any:
        """A new tensor that stands for ``var`` (its content does not matter)."""
        ty = var.type
        assert isinstance(ty, TensorType)
        with self.pause(), torch.no_grad():
            t = torch.empty_strided(ty.shape, ty.stride, dtype=ty.dtype, device=ty.device)
            t.fill_(1)
        self.bind(t, var)
        return t

    def draw_tensor(self, t: Tensor, var: Var) -> None:
        """A tensor that an iterable of the user's just produced."""
        mem = self.memories.of(t)
        if any(not self._pristine(r) for r in mem.roots):
            raise CaptureError(
                "an iterable gives a tensor whose memory the loop writes", loc=self.place(),
                advice="draw copies (x.clone()), or write to a tensor of its own",
            )  # fmt: skip
        storage = Storage(var)
        storage.external = "draw"
        old = mem.layouts.get(layout_of(t))
        if old is not None and old.storage in mem.roots:
            mem.roots.remove(old.storage)
        mem.root(layout_of(t), storage)

    def drawn(self, source: int, visit: int, tensors: Sequence[Tensor]) -> None:
        """As :meth:`Tracer.drawn`."""
        loc, site = self.locate()
        outs = tuple(Var(TensorType.of(t)) for t in tensors)
        self.builder.append(Eqn(Draw(source, visit), (), outs, (), loc, "draw", site))
        self.drawn_items.setdefault((source, visit), []).append(list(tensors))
        for t, v in zip(tensors, outs, strict=True):
            self.draw_tensor(t, v)

    def before_item(self) -> Any:
        """As :meth:`Tracer.before_item`: what draws data does so again at later calls, and is not looked at."""
        if self.reads is not None:
            self.reads.pause()
        with self.pause():
            return self.random.continues(None), torch.get_rng_state()

    def items(self, source: int, visit: int, k: int) -> list[Tensor]:
        """Tensors of an item that the run drew."""
        return self.drawn_items[source, visit][k]

    def after_item(self, key: tuple[int, int, int], before: Any) -> None:
        """As :meth:`Tracer.after_item`: an iterable that draws moves the generator as it does at a later call."""
        with self.pause():
            self._moved(key, *before)
        if self.reads is not None:
            self.reads.resume()

    def _moved(self, key: tuple[int, int, int], continues: bool, state: Tensor) -> None:
        now = torch.get_rng_state()
        if not torch.equal(state, now):
            self.item_states[key] = now
        if continues:
            self.random.left(None)
        source, visit, at = key
        if at == -1:
            self._opened[source, visit] = now
        elif at == 0 and not torch.equal(self._opened[source, visit], state):
            self.reordered = True  # other draws came between: a later call opens the iterable only here

    # ---- views

    def _view(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        base = self.handle(args[0])
        if args[0].requires_grad and args[0].is_leaf:
            self.read(args[0], False)  # it becomes a leaf before anything is derived from it
        cut = self.cut_of(args[0])
        if func is _A.detach.default and cut is None:
            cut = self.place()
        loc = self.locate()[0]
        flat = [out] if isinstance(out, Tensor) else list(out)
        types = [TensorType.of(t) for t in flat]
        kw = tuple(kwargs.items())
        for i, t in enumerate(flat):
            mem = self.memories.of(t)
            if mem is not self.memories.find(args[0]):  # an operator that may view did copy
                self.wrap(t, self._emit(func, (self.value(base), *args[1:]), types, kw)[i])
                continue
            lay = layout_of(t)
            known = mem.layouts.get(lay)
            if known is None or known.storage is not base.storage:
                mem.layouts[lay] = Handle(base.storage, (*base.chain, (func, tuple(args[1:]), kw, i, types, loc)))
            if cut is not None:
                self.cut_tensors[t] = cut
        return out

    def _inplace_view(self, func: Any, args: Any, kwargs: Any) -> Any:
        t = args[0]
        base = self.handle(t)
        func(*args, **kwargs)
        op = functional_variant(func)
        lay = layout_of(t)
        mem = self.memories.of(t)
        if lay not in mem.layouts or mem.layouts[lay].storage is not base.storage:
            step = (op, tuple(args[1:]), tuple(kwargs.items()), 0, [TensorType.of(t)], self.locate()[0])
            mem.layouts[lay] = Handle(base.storage, (*base.chain, step))
        return t

    # ---- writes

    def will_write(self, t: Tensor) -> None:
        """A memory is about to change: keep what it held before the call, and relate what shares it."""
        mem = self.memories.find(t)
        outside = mem is None or any(r.external is not None for r in mem.roots)
        if outside:
            self.handle(t)
            with self.pause():
                self.snapshots.keep(t)
            self.join(self.memories.of(t))

    def _inplace(self, func: Any, s: Any, args: Any, kwargs: Any) -> Any:
        t = args[0]
        self.will_write(t)
        random = s.random and self.random_is_data
        if random:
            func(*args, **kwargs)
            with self.pause():
                self._fix(t, t.clone())
            return t
        self.target = t
        try:
            super()._inplace(func, s, args, kwargs)
        finally:
            self.target = None
        func(*args, **kwargs)
        if self.trail is not None:
            with self.pause():
                self.trail[self.present(t)] = t.detach().clone()
        return t

    def _fix(self, t: Tensor, value: Tensor) -> None:
        """What ``t`` now holds is data of this call."""
        h = self._data(value)
        self.write(t, h.storage.var)

    def _out(self, func: Any, s: Any, args: Any, kwargs: Any) -> Any:
        targets = [kwargs[k] for k in s.out]
        for t in targets:
            self.will_write(t)
        out = super()._out(func, s, args, kwargs)
        with self.pause():
            func(*args, **kwargs)
        return out

    def _fake_run(self, func: Any, args: Any, kwargs: Any) -> Any:
        fargs, fkwargs = map_tensors(args, self.twin), map_tensors(kwargs, self.twin)
        with _disable_current_modes(), self.fake_mode:
            return func(*fargs, **fkwargs)

    def write(self, t: Tensor, new: Var) -> None:
        """As :meth:`Values.write`; what was there before this stretch of code becomes state."""
        s = self.handle(t).storage
        if s.external is not None or s.born != self.region() or self.cut_of(t) is not None:
            s.updated = True
            new = self.as_state(new)
        super().write(t, new)
        if not torch.is_grad_enabled() and not s.updated:
            self.cut_vars[s.var] = self.place()

    def wrote(self, h: Handle) -> None:
        """A storage changed; the step of a leaf is history for gradients taken at its own level."""
        s = h.storage
        if s.leaf and not s.copied and s.var.mask:
            s.var = self._stop(s.var, h, level=self.depth())
        if isinstance(s.external, External):
            s.external.written = True

    def rebind(self, t: Tensor, value: Tensor) -> None:
        """``t.data = value``: the tensor goes over to another memory, which is state from here on."""
        if torch.nn.parameter.is_lazy(t):
            return
        self.handle(t)
        h = self.handle(value)
        if h.storage.external is None:
            h.storage.updated = True
            if not h.chain:
                h.storage.var = self.as_state(h.storage.var)
                h.storage.version += 1
            h.storage.leaf = h.storage.leaf or (t.requires_grad and t.is_leaf)
        self.rebound[id(t)] = t

    # ---- Python numbers

    def link(self, f: Callable[..., Tensor], *operands: Any) -> Tensor | None:
        """Run ``f`` on numbers' tensors, recorded (see :class:`~mlc.trace.numberlinks.Ledger`)."""
        if self.ended:
            return None
        given = [x.tensor if isinstance(x, Linked) else x for x in operands]
        with torch._C.DisableTorchFunction(), torch.no_grad(), self.active():
            return f(*given)

    def scalar(self, t: Tensor) -> Any:
        """C++ or Python asks for the number in a tensor: the real one, which later calls must find again."""
        with self.pause():
            value = _A._local_scalar_dense.default(t)
        self.guard(t, value, "a Python number")
        return value

    def guard(self, t: Tensor, outcome: Any, what: str) -> None:
        """Later calls must find the same outcome in ``t``."""
        if self.ended:
            return
        var = self.present(t)
        self.decisions.append((var, outcome, what, self.place()))

    # ---- .grad

    def read_grad(self, t: Tensor, accumulating: bool = False) -> None:
        """Python looks at ``t.grad``, or ``backward`` adds to it: what it was before the call counts."""
        self.gradients.later.settle(t)
        if id(t) not in self.grads:
            self.grad_reads.setdefault(id(t), (t, get_grad(t) is None))
            if not accumulating:
                self.grads_seen.add(id(t))

    def set_grad(self, t: Tensor, g: Tensor | None = None) -> None:
        """``t.grad`` is set: from here on it is the call's own."""
        self.gradients.later.forget(t)
        self.keep_grad(t)
        self.grads[id(t)] = (t, None)

    def keep_grad(self, t: Tensor) -> None:
        """Remember what ``t.grad`` was before the call."""
        self.initial_grads.setdefault(id(t), (t, get_grad(t)))

    def zero(self, g: Tensor) -> None:
        """A gradient that PyTorch made of zeros."""
        with torch.no_grad(), self.active():
            z = torch.zeros(g.shape, dtype=g.dtype, device=g.device)
        self.bind(g, self.value(self.handle(z)))

    def add(self, a: Var, b: Var) -> Var:
        """The sum of two values of one shape."""
        (out,) = self._emit(_A.add.Tensor, (a, b), (a.type,))
        return out  # type: ignore[no-any-return]

    def evaluate(self, v: Var) -> Tensor:
        """The value of a gradient that PyTorch's graph does not have, computed from the recording."""
        from mlc.trace.evaluate import evaluate

        return evaluate(self, [v])[0]

    # ---- copies

    def leaf_copy(self, t: Tensor, is_parameter: bool) -> Tensor:
        """A fresh leaf whose value is that of ``t``, derivative included."""
        v = self.value(self.handle(t))
        if t.requires_grad and t.is_leaf:
            v = self.read(t, False)
        self.farther = True
        before, self.tag = self.tag, "clone"
        (new,) = self._emit(Alias(), (v,), (v.type,))
        self.tag = before
        with self.pause(), torch.no_grad():
            c: Tensor = t.detach().clone(memory_format=torch.preserve_format)
            if TensorType.of(c) != v.type:
                ty = v.type
                assert isinstance(ty, TensorType)
                c = torch.empty_strided(ty.shape, ty.stride, dtype=ty.dtype, device=ty.device).copy_(t)
            if is_parameter:
                c = torch.nn.Parameter(c, requires_grad=t.requires_grad)
        h = self.bind(c, new)
        if is_parameter and c.requires_grad:
            h.leaf = h.storage.leaf = h.storage.copied = True
            self.new_bit(new)
            self.leaves[id(c)] = c
            self.seen_leaves[c] = True
        return c


# ---- operators that are not taken literally, where that differs from recording on fake tensors


def _literal(ob: Observer, func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.tensor(...)``: a constant."""
    t: Tensor = args[0]
    if ob.memories.find(t) is not None:
        return t
    if t.numel() == 1 and not t.dtype.is_complex:
        with ob.pause():
            value = t.item()
        kw = (("dtype", t.dtype), ("device", t.device), ("pin_memory", False))
        ob.bind(t, ob._emit(_A.full.default, (list(t.shape), value), (TensorType.of(t),), kw)[0])
    else:
        ob._outside(t, ob.memories.of(t), None)
    return t


def _zeros(ob: Observer, func: Any, args: Any, kwargs: Any) -> Any:
    kw = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
    with ob.active():
        return torch.zeros(list(args[0]), **kw)


def _dropout(ob: Observer, func: Any, args: Any, kwargs: Any) -> Any:
    """Fused dropout as a product with the mask that it drew."""
    x, p, train = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("train", True)
    if not train:
        with ob.active():
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
    _, mask = func(*args, **kwargs)
    if ob.random_is_data:
        ob._data(mask)
    else:
        ty = TensorType.of(x)
        layout = (ty.shape, ty.stride, ty.dtype, ty.device)
        (v,) = ob._emit(Random(_A.native_dropout.default, fill=True), (*layout, p), (TensorType.of(mask),))
        ob.bind(mask, v)
    with ob.active():
        return x * mask * (0.0 if p == 1 else 1.0 / (1.0 - p)), mask


def _rrelu(ob: Observer, func: Any, args: Any, kwargs: Any) -> Any:
    """Randomised leaky ReLU: the slopes are drawn, the rest is a product."""
    given = {**dict(zip([a.name for a in func._schema.arguments], args, strict=False)), **kwargs}
    x, noise = given["self"], given["noise"]
    lower, upper = given.get("lower", 0.125), given.get("upper", 1 / 3)
    if not given.get("training", False):
        with ob.active():
            return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    values = tuple(ob.value(ob.handle(t)) for t in (x, noise))
    pure = _A.rrelu_with_noise_functional.default
    out, slopes = pure(x, noise, lower, upper, True, given.get("generator"))
    if ob.random_is_data:
        ob._data(slopes)
    else:
        types = [TensorType.of(out), TensorType.of(slopes)]
        ob.bind(slopes, ob._emit(Random(pure), (*values, lower, upper, True), types)[1])
    with ob.active():
        with torch.no_grad():
            noise.copy_(slopes)
        return x * slopes


def _native(ob: Observer, func: Any, args: Any, kwargs: Any) -> Any:
    """The memory of a tensor is replaced or resized: what it then holds is found where it then lies."""
    return func(*args, **kwargs)


SPECIAL_REAL: dict[Any, Any] = {
    _A.lift_fresh.default: _literal,
    _A._efficientzerotensor.default: _zeros,
    _A.native_dropout.default: _dropout,
    _A.rrelu_with_noise.default: _rrelu,
    _A._grouped_mm.default: lambda ob, f, a, k: ob.plain(f, a, k),
    _A.set_.source_Storage: _native,
    _A.set_.source_Tensor: _native,
    _A.set_.source_Storage_storage_offset: _native,
    _A.resize_.default: _native,
}


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    add: Callable[[Tensor], None] = found.append
    each_tensor(args, add)
    each_tensor(kwargs, add)
    return found


def _from_flat(whole: Tensor, lay: Layout) -> list[Any]:
    """View steps from the whole of a memory to a layout in it."""
    offset, shape, stride, dtype = lay[:4]
    n = 1
    for s in shape:
        n *= s
    contiguous = torch.empty(shape, device="meta").stride() == stride
    if not contiguous:
        ty = TensorType(dtype, shape, stride, whole.device)
        return [(_A.as_strided.default, (list(shape), list(stride), offset), (), 0, [ty], None)]
    part = TensorType(dtype, (n,), (1,), whole.device)
    steps: list[Any] = [(_A.slice.Tensor, (0, offset, offset + n), (), 0, [part], None)]
    if shape != (n,):
        steps.append((_A.view.default, (list(shape),), (), 0, [TensorType(dtype, shape, stride, whole.device)], None))
    return steps
