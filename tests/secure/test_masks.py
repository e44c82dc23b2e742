"""Masks cancel in the sum, to the bit, and nowhere else; what a site does not join."""

from __future__ import annotations

import base64
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy.stats import chisquare

from fedrun.common.errors import InputError
from fedrun.secure import ForgedSignature, Replayed, WrongMembers
from fedrun.secure.masks import PIECE, Mask, Offer, Session
from tests.support import naive_crypto as naive
from tests.support.sites import MakeSites, Sites

TYPES = {32: np.int32, 64: np.int64}


def terms(count: int, size: int, bits: int, fits: bool = True) -> list[np.ndarray]:
    """Integers of one vector for each site; their sum fits the type, or wraps."""
    random, largest = np.random.default_rng(size), 2**(bits - 1) - 1
    largest //= count if fits else 1
    return [random.integers(-largest, largest, size, TYPES[bits]) for _ in range(count)]


# ---- sums ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [0, 1, 3, PIECE // 4 - 1, PIECE // 4, PIECE // 4 + 1, 100_003])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("count", [3, 5])
def test_the_sum_has_the_same_bits(make_sites: MakeSites, count: int, bits: int, size: int) -> None:
    sites = make_sites(count).agree()
    for number, fits in ((1, True), (2, False)):
        plain = terms(count, size, bits, fits)
        sent = sites.masked(plain, number)
        assert np.array_equal(np.sum(sent, 0, TYPES[bits]), np.sum(plain, 0, TYPES[bits]))
        for site in range(count if size > 3 else 0):
            assert not np.array_equal(sent[site], plain[site])
            others = [vector for other, vector in enumerate(sent) if other != site]
            rest = [vector for other, vector in enumerate(plain) if other != site]
            assert not np.array_equal(np.sum(others, 0, TYPES[bits]), np.sum(rest, 0, TYPES[bits]))


def test_a_round_of_several_sums_in_any_order(make_sites: MakeSites) -> None:
    """Sites may make the masks of a round in different orders, and leave rounds out together."""
    sites = make_sites(3).agree()
    plain = {"count": terms(3, 1, 64), "vector": terms(3, 1000, 32), "tail": terms(3, 16, 64)}
    for number in (1, 2, 7):
        total = {name: np.zeros_like(vectors[0]) for name, vectors in plain.items()}
        for place, session in enumerate(sites.sessions.values()):
            for name in sorted(plain, reverse=place == 1):
                vector = plain[name][place].copy()
                session.mask(number, name, vector.itemsize * 8).add_to(vector)
                total[name] += vector
        for name, vectors in plain.items():
            assert np.array_equal(total[name], np.sum(vectors, 0, vectors[0].dtype))


def test_memory_of_torch(make_sites: MakeSites) -> None:
    torch = pytest.importorskip("torch")
    sites = make_sites(3).agree()
    vectors = [torch.arange(-5, 5, dtype=torch.int32) * site for site in range(3)]
    expected = sum(vectors, torch.zeros(10, dtype=torch.int32))
    for session, vector in zip(sites.sessions.values(), vectors, strict=True):
        session.mask(1, "vector", 32).add_to(vector.numpy())
    assert torch.equal(sum(vectors, torch.zeros(10, dtype=torch.int32)), expected)


def test_a_mask_made_ahead_in_a_thread(make_sites: MakeSites) -> None:
    """Added to zeros in another thread, and these to the vector later: the same sum."""
    plain, total = terms(3, 100_000, 32), np.zeros(100_000, np.int32)
    for session, vector in zip(make_sites(3).agree().sessions.values(), plain, strict=True):
        ahead = np.zeros_like(vector)
        thread = threading.Thread(target=session.mask(1, "vector", 32).add_to, args=(ahead,))
        thread.start()
        thread.join()
        assert ahead.any()
        total += vector + ahead
    assert np.array_equal(total, np.sum(plain, 0, np.int32))


# ---- what a mask is ------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [32, 64])
def test_against_the_naive_implementation(make_sites: MakeSites, bits: int) -> None:
    sites = make_sites(3)
    private = {name: session._key for name, session in sites.sessions.items()}
    raw = {name: key.private_bytes_raw() for name, key in private.items() if key is not None}
    nonces = sites.nonces
    sites.agree()
    publics = {name: naive.x25519(key, (9).to_bytes(32, "little")) for name, key in raw.items()}
    agreement = naive.framed("run", naive.framed(*nonces), naive.framed(*nonces.values()), "plan")
    for number, name in ((1, "vector"), (1, "tail"), (3, "vector")):
        for site, session in sites.sessions.items():
            vector = np.zeros(37, TYPES[bits])
            session.mask(number, name, bits).add_to(vector)
            expected = naive.mask(site, raw[site], publics, agreement, number, name, bits, 37)
            assert [int(x) % 2**bits for x in vector] == list(expected)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_masked_vector_is_uniform(make_sites: MakeSites, bits: int) -> None:
    """Over the bytes at every place of an element, for every site and a vector of zeros or of small
    numbers: chance of a false alarm below 1e-7 in all."""
    sites = make_sites(3).agree()
    small = [np.full(1 << 18, site - 1, TYPES[bits]) for site in range(3)]
    assert chisquare(np.bincount(small[0].view(np.uint8), minlength=256)).pvalue < 1e-9
    for number, vectors in ((1, [np.zeros_like(vector) for vector in small]), (2, small)):
        sent = sites.masked(vectors, number)
        for vector in [*sent, sent[0] - sent[1], sent[0] + sent[1]]:  # two of three: still masked
            for place in range(bits // 8):
                found = np.bincount(vector.view(np.uint8)[place::bits // 8], minlength=256)
                assert chisquare(found).pvalue > 1e-9
                neighbours = vector.view(np.uint8)[place::bits // 8]
                differences = np.bincount(neighbours[1:] - neighbours[:-1], minlength=256)
                assert chisquare(differences).pvalue > 1e-9


def test_no_two_masks_share_a_block(make_sites: MakeSites) -> None:
    """Over starts, rounds, sums, widths and pairs: all blocks of 16 bytes are different."""
    sites, blocks, count = make_sites(3), list[bytes](), 0

    def collect(mask: Mask, bits: int) -> None:
        for stream in mask._streams:  # of one pair
            alone = Mask([], bits)
            alone._streams = [(True, stream[1])]
            vector = np.zeros(512 // (bits // 8), TYPES[bits])
            alone.add_to(vector)
            raw = vector.tobytes()
            blocks.extend(raw[i:i + 16] for i in range(0, len(raw), 16))

    for start in (sites.agree(), sites.again().agree()):
        for number in (1, 2, 3):
            for name, bits in (("vector", 32), ("tail", 64), ("count", 64)):
                for session in start.sessions.values():
                    collect(session.mask(number, name, bits), bits)
                count += 3  # pairs; each is made by two sites
    assert len(blocks) == 2 * 32 * count
    assert len(set(blocks)) == 32 * count


def test_the_width_is_part_of_the_key(make_sites: MakeSites) -> None:
    """The same sum in both: two sessions with the same keys of pairs."""
    made = []
    for session, bits in zip(make_sites(3).agree().sessions.values(), (32, 64), strict=False):
        session._keys = [(True, bytes(32))]
        vector = np.zeros(64, TYPES[bits])
        session.mask(1, "vector", bits).add_to(vector)
        made.append(vector.tobytes()[:64])
    assert made[0] != made[1]


def test_keys_of_past_rounds_are_gone(make_sites: MakeSites) -> None:
    session = next(iter(make_sites(3).agree().sessions.values()))
    before = [key for _, key in session._keys]
    session.mask(1, "vector", 32)
    after_one = [key for _, key in session._keys]
    session.mask(3, "vector", 32)
    assert not set(before) & set(after_one)
    assert not set(after_one) & {key for _, key in session._keys}


# ---- what is refused -----------------------------------------------------------------------------

def test_a_mask_is_made_and_added_once(make_sites: MakeSites) -> None:
    session = next(iter(make_sites(3).agree().sessions.values()))
    mask = session.mask(2, "vector", 32)
    vector = np.zeros(8, np.int32)
    mask.add_to(vector)
    before = vector.copy()
    for again in (lambda: mask.add_to(vector), lambda: session.mask(2, "vector", 32),
                  lambda: session.mask(2, "vector", 64), lambda: session.mask(1, "tail", 32),
                  lambda: session.mask(-1, "tail", 32)):
        with pytest.raises(Replayed):
            again()
    assert np.array_equal(vector, before)
    session.mask(2, "tail", 32)
    session.mask(3, "vector", 32)


@pytest.mark.parametrize("vector", [
    np.zeros(8, np.int64), np.zeros(8, np.float32), np.zeros(8, ">i4"), np.zeros((4, 2), np.int32),
    np.zeros(8, bool), np.zeros(8, "datetime64[s]")], ids=lambda v: f"{v.dtype.str}{v.ndim}")
def test_a_vector_that_a_mask_does_not_fit(make_sites: MakeSites, vector: np.ndarray) -> None:
    """It is left as it is, and the mask is still good for the right one."""
    session = next(iter(make_sites(3).agree().sessions.values()))
    mask = session.mask(1, "vector", 32)
    with pytest.raises(TypeError):
        mask.add_to(vector)
    assert not vector.view(np.uint8).any()
    right = np.zeros(8, np.int32)
    mask.add_to(right)
    assert right.any()


def test_a_vector_that_cannot_be_written_stays_unsent_and_the_mask_is_spent(make_sites: MakeSites
                                                                            ) -> None:
    session = next(iter(make_sites(3).agree().sessions.values()))
    mask, vector = session.mask(1, "vector", 32), np.zeros(8, np.int32)
    vector.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        mask.add_to(vector)
    with pytest.raises(Replayed):
        mask.add_to(np.zeros(8, np.int32))


def test_a_vector_that_is_not_contiguous() -> None:
    """Its elements get the same mask, and what lies between them none."""
    spread, dense = np.zeros(20, np.int32), np.zeros(10, np.int32)
    for vector in (spread[::2], dense):
        Mask([(True, bytes(range(32)))], 32).add_to(vector)
    assert np.array_equal(spread[::2], dense)
    assert not spread[1::2].any()


def test_no_keys_no_mask(make_sites: MakeSites) -> None:
    """Before the keys are agreed on, and after that has failed, however late."""
    sites = make_sites(3)
    session = sites.sessions["north"]
    with pytest.raises(Replayed):
        session.mask(1, "vector", 32)
    offers = sites.offers()
    with pytest.raises(Replayed):
        session.mask(1, "vector", 32)
    with pytest.raises(ForgedSignature):
        session.agree(offers | {"east": (offers["east"][0], bytes(64))})
    for again in (lambda: session.mask(1, "vector", 32), lambda: session.agree(offers)):
        with pytest.raises(Replayed):
            again()
    assert not session._keys


Attempt = Callable[[Sites], object]


def agreeing(change: Callable[[Sites, dict[str, Offer]], Mapping[str, Offer]]) -> Attempt:
    """North gets other offers than those that were made."""
    def attempt(sites: Sites) -> None:
        sites.sessions["north"].agree(change(sites, sites.offers()))
    return attempt


def offering(change: Callable[[Sites, dict[str, bytes]], Mapping[str, bytes]]) -> Attempt:
    """North gets other nonces than those that were drawn."""
    def attempt(sites: Sites) -> None:
        sites.sessions["north"].offer("run", change(sites, sites.nonces), b"plan")
    return attempt


def twice(sites: Sites) -> None:
    offers = sites.offers()
    for _ in range(2):
        sites.sessions["north"].agree(offers)


def small_order(point: bytes) -> Attempt:
    return agreeing(lambda s, o: o | {"south": signed_by(s, "south", "south", point)})


def signed_by(sites: Sites, signer: str, name: str, public: bytes, agreement: bytes = b"") -> Offer:
    made = agreement or sites.sessions["north"]._agreement
    return public, sites.identities[signer].sign("offer", made, name, public)


def fresh() -> bytes:
    return X25519PrivateKey.generate().public_key().public_bytes_raw()


def refusals() -> Iterator[tuple[str, type[Exception], str, Attempt]]:
    """Name, error, its beginning, and what is tried at the site `north` of `north south east`."""
    forged = ForgedSignature
    yield "signed by another site", forged, "south: its offer is not signed", agreeing(
        lambda s, o: o | {"south": signed_by(s, "east", "south", fresh())})
    yield "a signature of zeros", forged, "south: ", agreeing(
        lambda s, o: o | {"south": (o["south"][0], bytes(64))})
    yield "a signature too short", forged, "south: ", agreeing(
        lambda s, o: o | {"south": (o["south"][0], o["south"][1][:63])})
    yield "another key under the signature", forged, "south: ", agreeing(
        lambda s, o: o | {"south": (fresh(), o["south"][1])})
    yield "signed for something else", forged, "south: ", agreeing(
        lambda s, o: o | {"south": (o["south"][0], s.identities["south"].sign(
            "server", s.sessions["north"]._agreement, "south", o["south"][0]))})
    yield "an offer of another site", forged, "south: ", agreeing(
        lambda s, o: o | {"south": o["east"]})
    yield "another key for this site", forged, "north: ", agreeing(
        lambda s, o: o | {"north": (fresh(), o["north"][1])})
    yield "a replayed offer of another start", forged, "south: ", agreeing(
        lambda s, o: o | {"south": s.again().offers()["south"]})
    yield "another run", forged, "south: ", agreeing(
        lambda s, o: o | {"south": signed_by(s, "south", "south", fresh(), naive.framed(
            "other", naive.framed(*s.nonces), naive.framed(*s.nonces.values()), "plan"))})
    yield "another plan", forged, "south: ", agreeing(
        lambda s, o: o | {"south": signed_by(s, "south", "south", fresh(), naive.framed(
            "run", naive.framed(*s.nonces), naive.framed(*s.nonces.values()), "other"))})
    for name, point in (("zero", bytes(32)), ("one", (1).to_bytes(32, "little")),
                        ("order eight", bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46a"
                                                      "da098deb9c32b1fd866205165f49b800"))):
        yield f"a key of small order: {name}", forged, "south: offers a key that", small_order(
            point)
    yield "a member too many offers", WrongMembers, "north, south, east, west would", agreeing(
        lambda s, o: o | {"west": o["east"]})
    yield "a member lacks", WrongMembers, "north, south would", agreeing(
        lambda s, o: {name: o[name] for name in ("north", "south")})
    yield "members in another order", WrongMembers, "south, north, east would", agreeing(
        lambda s, o: {name: o[name] for name in ("south", "north", "east")})
    yield "a member too many", WrongMembers, "north, south, east, west would take part", offering(
        lambda s, n: n | {"west": bytes(32)})
    yield "a member too few", WrongMembers, "north, south would take part", offering(
        lambda s, n: {name: n[name] for name in ("north", "south")})
    yield "another member", WrongMembers, "north, south, west would take part", offering(
        lambda s, n: {"north": n["north"], "south": n["south"], "west": n["east"]})
    yield "a replayed nonce of this site", Replayed, "north: the nonces", offering(
        lambda s, n: n | {"north": s.again().nonces["north"]})
    yield "this site's nonce for another", Replayed, "north: the nonces", offering(
        lambda s, n: n | {"south": n["north"]})
    yield "one nonce for two others", Replayed, "north: the nonces", offering(
        lambda s, n: n | {"south": n["east"]})
    yield "a second offer at a start", Replayed, "north: the nonces", lambda s: (
        s.offers(), s.sessions["north"].offer("run", s.nonces, b"other plan"))
    yield "keys twice", Replayed, "north: keys are made once", twice
    yield "keys without an offer", Replayed, "north: keys are made once", lambda s: (
        s.sessions["north"].agree(s.again().offers()))
    yield "two sites", WrongMembers, "2 sites", lambda s: Session(
        "north", s.identities["north"], {n: s.pinned[n] for n in ("north", "south")})
    yield "another site's name", InputError, "south: must have the key", lambda s: Session(
        "south", s.identities["north"], s.pinned)
    yield "an unknown name", InputError, "west: must have the key", lambda s: Session(
        "west", s.identities["north"], s.pinned)
    yield "two sites with one key", InputError, "north: must have the key", lambda s: Session(
        "north", s.identities["north"], s.pinned | {"east": s.pinned["south"]})


@pytest.mark.parametrize(("name", "error", "begins", "attempt"), list(refusals()),
                         ids=[name for name, *_ in refusals()])
def test_what_a_site_refuses(make_sites: MakeSites, name: str, error: type[Exception], begins: str,
                             attempt: Attempt) -> None:
    sites = make_sites(3)
    session = sites.sessions["north"]
    assert session._key is not None
    secrets = [session._key.private_bytes_raw(),
               *(one._key.private_bytes_raw() for one in sites.identities.values())]
    with pytest.raises(error) as refused:
        attempt(sites)
    line = str(refused.value)
    assert line.startswith(begins)
    assert "\n" not in line
    assert not session._keys or name == "keys twice"
    shown = line + repr(session) + repr(sites.identities) + repr(refused.value.args)
    for secret in secrets:
        for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]):
            assert form not in shown


def test_a_copied_key_of_another_site_gives_no_other_secret(make_sites: MakeSites) -> None:
    """East passes south's key off as its own. It does not know that key's secret, and north's two
    streams differ all the same: they cannot cancel each other."""
    sites = make_sites(3)
    offers = sites.offers()
    public = offers["south"][0]
    north = sites.sessions["north"]
    offers["east"] = signed_by(sites, "east", "east", public)
    north.agree(offers)
    assert len({key for _, key in north._keys}) == 2


def test_sites_that_were_told_different_plans_share_no_key(make_sites: MakeSites) -> None:
    """Whoever passes offers on can tell sites different things, but then none verifies."""
    sites = make_sites(3)
    nonces = sites.nonces
    offers = {name: session.offer("run", nonces, b"one" if name == "north" else b"two")
              for name, session in sites.sessions.items()}
    for name, session in sites.sessions.items():
        with pytest.raises(ForgedSignature, match="^south: " if name == "north" else "^north: "):
            session.agree(offers)


def test_nothing_secret_can_be_copied_out(make_sites: MakeSites) -> None:
    sites = make_sites(3)
    for one in (sites.identities["north"], sites.sessions["north"]):
        with pytest.raises(TypeError):
            pickle.dumps(one)
    session = sites.agree().sessions["north"]
    shown = repr(session) + repr(session.mask(1, "vector", 32)) + repr(sites.identities["north"])
    assert not any(key.hex() in shown or repr(key)[2:-1] in shown for _, key in session._keys)


def test_one_identity_for_every_start(make_sites: MakeSites) -> None:
    """The long-lived key makes no mask: two starts share nothing, not even what they offer."""
    sites, seen, publics = make_sites(3), list[bytes](), list[bytes]()
    for start in (sites, sites.again(), sites.again()):
        offers = start.offers()
        publics += [public for public, _ in offers.values()]
        for session in start.sessions.values():
            session.agree(offers)
        seen += [key for _, key in start.sessions["north"]._keys]
        publics.append(start.nonces["north"])
    assert len(set(publics)) == len(publics) == 12
    assert len(set(seen)) == len(seen) == 6
