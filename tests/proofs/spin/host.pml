/* The kernels of path host: one channel (a warp) on each of N ranks, through CALLS calls of any number of chunks. See docs/verification.md;
 * run by test_spin.py.
 *
 * A rank stores into its own outbox, which all peers read. A slot holds the number of the last chunk that went through it, plus one; its
 * phase is all that a reader looks at. TWO_SHOT 0: a ring of RING slots, AHEAD chunks stored before the first is received
 * (host_one_shot.cu). TWO_SHOT 1: a slot for each rank; slot q carries what q is to sum, the own one the sum (host_two_shot.cu).
 *
 * Asserted: a slot is written when everybody has read what it held; what is read is the chunk that was waited for. A hang is an invalid
 * end state. FAILURES: rank 0 may die anywhere, and every rank give up anywhere: it stores nothing more, in later calls either.
 *
 * What is merged: a store reaches all at once (a reader that sees it later is one that reads later: a place is never read but for the
 * use that comes next, and coherence forbids to go back), and a wait for all peers is one step. Channels meet nowhere but in calls.
 */
#ifndef N
#define N 3
#endif
#ifndef CALLS
#define CALLS 2
#endif
#ifndef MOST
#define MOST 3          /* chunks of a call */
#endif
#ifndef AHEAD
#define AHEAD 1
#endif
#ifndef RING
#define RING (2 * AHEAD)
#endif
#ifndef TWO_SHOT
#define TWO_SHOT 0
#endif
#ifndef FAILURES
#define FAILURES 0
#endif

/* Planted mistakes, by -DMUTANT=... */
#define NONE 0
#define ONE_PHASE 1     /* the phase does not change */
#define STORES_FIRST 2  /* the chunk that is AHEAD is stored before this one is received */
#define COUNTS_CALLS 3  /* a call counts as one chunk */
#define GATHERS_LATE 4  /* the next chunk is scattered before the sums have come */
#define SUMS_EARLY 5    /* the own sum is stored before all chunks to be summed have come */
#define STORES_ON 6     /* a rank that gave up goes on storing */
#define NO_DEADLINE 7   /* nobody gives up */
#ifndef MUTANT
#define MUTANT NONE
#endif

#define SLOTS (TWO_SHOT -> N : RING)
#define USE(c) (TWO_SHOT -> (c) : (c) / RING)
#define PHASE(c) (MUTANT == ONE_PHASE -> 1 : 1 - USE(c) % 2)
#define HELD(owner, s) slot[(owner) * SLOTS + (s)]
#define PHASE_OF(owner, s) (HELD(owner, s) == 0 -> 0 : PHASE(HELD(owner, s) - 1))
#define GOT(reader, source, what) got[(((what) * N + (reader)) * N + (source))]   /* chunks received; what: 0 data, 1 sums */
#define FROM(q, s) ((q) >= N || (q) == me || PHASE_OF((q) % N, s) == PHASE(c))
#define DEAD (me == 0 && dead)

byte slot[N * 16];
byte got[2 * N * N];
byte chunks[CALLS];
bit dead;
byte ended;

/* Chunk number `at` into slot s, which `reader` alone reads, or all (N). `what`: see GOT. */
inline store(at, s, reader, what, lag) {
    for (peer : 0 .. N - 1) {
        if
        :: peer != me && (reader == N || reader == peer) && at >= lag -> assert(GOT(peer, me, what) > at - lag)
        :: else
        fi
    }
    peer = 0;
    HELD(me, s) = at + 1
}

inline take(s, own, what) {
    for (peer : 0 .. N - 1) {
        if
        :: peer != me -> assert(HELD(peer, (own -> peer : s)) == c + 1); GOT(me, peer, what) = c + 1
        :: else
        fi
    }
    peer = 0
}

inline scatter(at) {
    for (to : 0 .. N - 1) {
        if
        :: to != me -> store(at, to, to, 0, 1)
        :: else
        fi
    }
    to = 0
}

proctype rank(byte me) {
    byte k, first, done, c, peer, to, i;
    bit stopped;

    do
    :: k == CALLS || DEAD -> break
    :: k < CALLS && !DEAD ->
        /* the kernel begins */
        done = 0;
        if
        :: stopped && MUTANT != STORES_ON
        :: (!stopped || MUTANT == STORES_ON) && !TWO_SHOT ->
            i = 0;
            do
            :: i < AHEAD && i < chunks[k] && !DEAD -> atomic { store(first + i, (first + i) % RING, N, 0, RING); i++ }
            :: i >= AHEAD || i >= chunks[k] || DEAD -> break
            od
        :: (!stopped || MUTANT == STORES_ON) && TWO_SHOT -> skip
        fi;
        do
        :: done == chunks[k] || DEAD || stopped && MUTANT != STORES_ON -> break
        :: done < chunks[k] && !DEAD && (!stopped || MUTANT == STORES_ON) && !TWO_SHOT ->
            c = first + done;
            if
            :: MUTANT == STORES_FIRST && done + AHEAD < chunks[k] ->
                atomic { store(c + AHEAD, (c + AHEAD) % RING, N, 0, RING) }
            :: else
            fi;
            if
            :: DEAD
            :: atomic { !DEAD && FROM(0, c % RING) && FROM(1, c % RING) && FROM(2, c % RING) && FROM(3, c % RING) -> take(c % RING, 0, 0); done++ };
                if
                :: MUTANT != STORES_FIRST && done - 1 + AHEAD < chunks[k] && !DEAD ->
                    atomic { store(c + AHEAD, (c + AHEAD) % RING, N, 0, RING) }
                :: else
                fi
            :: FAILURES && MUTANT != NO_DEADLINE && !DEAD -> stopped = 1; done++
            fi
        :: done < chunks[k] && !DEAD && (!stopped || MUTANT == STORES_ON) && TWO_SHOT ->
            c = first + done;
            if
            :: MUTANT == GATHERS_LATE && done > 0
            :: else -> atomic { scatter(c) }
            fi;
            if
            :: MUTANT == SUMS_EARLY && !DEAD -> atomic { store(c, me, N, 1, 1) }
            :: else
            fi;
            if
            :: DEAD
            :: atomic { !DEAD && FROM(0, me) && FROM(1, me) && FROM(2, me) && FROM(3, me) -> take(me, 0, 0) };
                if
                :: MUTANT != SUMS_EARLY && !DEAD -> atomic { store(c, me, N, 1, 1) }
                :: else
                fi;
                if
                :: MUTANT == GATHERS_LATE && done + 1 < chunks[k] && !DEAD -> atomic { scatter(c + 1) }
                :: else
                fi;
                if
                :: DEAD
                :: atomic { !DEAD && FROM(0, 0) && FROM(1, 1) && FROM(2, 2) && FROM(3, 3) -> take(0, 1, 1); done++ }
                :: FAILURES && MUTANT != NO_DEADLINE && !DEAD -> stopped = 1; done++
                fi
            :: FAILURES && MUTANT != NO_DEADLINE && !DEAD -> stopped = 1; done++
            fi
        od;
        /* the kernel is complete */
        atomic { first = first + (MUTANT == COUNTS_CALLS && chunks[k] > 0 -> 1 : chunks[k]); k++ }
    od;
    ended++
}

proctype death() {
    if
    :: d_step { FAILURES && !dead -> dead = 1 }
    :: true
    fi
}

init {
    byte i, j;
    for (i : 0 .. CALLS - 1) { select(j : 0 .. MOST); chunks[i] = j }
    atomic {
        for (i : 0 .. N - 1) { run rank(i) }
        run death()
    }
    ended == N
}
