/* A row of every rank: WARPS warps of a block, each with a channel of its own, exchange packets with the same warp of the peers; then all
 * warps of the block meet at its barrier, and go on. Calls follow each other through slots of two parities. See docs/verification.md; run
 * by test_spin.py.
 *
 * What allreduce.pml, which follows one channel, cannot show: warps that wait for each other. A warp that gives up goes on, with NaN in
 * place of what did not come, or the rest of its block would wait for ever. Every warp may give up at any moment, and rank 0 die, in the
 * midst of a push, too. What stopped a rank in one call is known to the next, which pushes nothing.
 *
 * A slot holds 0 (poisoned) or the number of the call, plus one. Asserted: a packet lands in an empty slot; a packet that is read is of
 * this call; a row is summed when all its warps have said what they have; it is NaN if one of them lacks packets; without failures all
 * slots are empty at the end. A hang is an invalid end state.
 *
 * What is merged: as in allreduce.pml, packets land when they are pushed, and a wait for all peers is one step, with the poison behind it.
 */
#ifndef N
#define N 2             /* ranks: 2 or 3 */
#endif
#ifndef WARPS
#define WARPS 2
#endif
#ifndef CALLS
#define CALLS 3
#endif
#ifndef FAILURES
#define FAILURES 1      /* whether rank 0 may die, and warps give up */
#endif

/* Planted mistakes, by -DMUTANT=... */
#define NONE 0
#define LEAVES 1        /* a warp that gives up ends before the barrier */
#define LEAVES_AT_ONCE 2/* so does one of a rank that was stopped in an earlier call */
#define NO_BARRIER 3    /* a warp sums the row when it has its own packets */
#define FORGETS 4       /* a warp that gives up has zeros */
#define NO_DEADLINE 5   /* nobody gives up */
#define ONE_PARITY 6    /* all calls go through the same slots */
#define NO_POISON 7     /* slots are not poisoned after reading */
#define PUSHES_ON 8     /* a rank that was stopped goes on pushing */
#define STALE_PARITY 9  /* one warp of a rank takes the wrong parity */
#ifndef MUTANT
#define MUTANT NONE
#endif

#define PARITY(k) (MUTANT == ONE_PARITY -> 0 : (MUTANT == STALE_PARITY && w == 1 && me == 0 -> ((k) + 1) % 2 : (k) % 2))
#define SLOT(owner, source) slot[(((owner) * WARPS + w) * 2 + PARITY(k)) * N + (source)]
#define HERE(source) ((source) >= N || (source) == me || SLOT(me, (source) % N) != 0)
#define ARRIVED (HERE(0) && HERE(1) && HERE(2))
#define DEAD (me == 0 && dead)
#define AT (me * CALLS + k)

byte slot[N * WARPS * 2 * N];
byte met[N * CALLS];        /* warps that came to the barrier */
byte through[N * CALLS];    /* that have ended */
bit nan[N * CALLS];         /* whether one of them had NaN */
bit stopped[N];             /* this rank was stopped */
bit dead;                   /* rank 0 */
byte ended;

inline push(reach) {
    for (peer : 0 .. N - 1) {
        if
        :: peer != me && (reach >> peer & 1) -> assert(SLOT(peer, me) == 0); SLOT(peer, me) = k + 1
        :: else
        fi
    }
    peer = 0
}

inline receive() {
    for (peer : 0 .. N - 1) {
        if
        :: peer != me ->
            assert(SLOT(me, peer) == k + 1);
            SLOT(me, peer) = (MUTANT == NO_POISON -> SLOT(me, peer) : 0)
        :: else
        fi
    }
    peer = 0
}

proctype warp(byte me, w) {
    byte k, peer;
    bit alive;
    bit lacks;      /* packets, of this call */

    do
    :: k == CALLS || DEAD -> break
    :: k < CALLS && !DEAD && (k == 0 || through[AT - (k > 0)] == WARPS) ->    /* the kernel before is complete */
        d_step { alive = !stopped[me] || MUTANT == PUSHES_ON; lacks = 0 };
        if
        :: d_step { alive && !DEAD -> push(255) }
        :: d_step { FAILURES && N > 2 && alive && me == 0 && !dead -> push(2); dead = 1 }
        :: d_step { FAILURES && N > 2 && alive && me == 0 && !dead -> push(4); dead = 1 }
        :: !alive || DEAD
        fi;
        if
        :: d_step { alive && !DEAD && ARRIVED -> receive() }
        :: d_step { (!alive || FAILURES && MUTANT != NO_DEADLINE) && !DEAD -> stopped[me] = 1; lacks = 1 }
        :: DEAD
        fi;
        if
        :: DEAD
        :: d_step { !DEAD && lacks && (MUTANT == LEAVES || MUTANT == LEAVES_AT_ONCE && !alive) -> through[AT]++; k++ }
        :: d_step { !DEAD && !(lacks && (MUTANT == LEAVES || MUTANT == LEAVES_AT_ONCE && !alive)) ->
                met[AT]++;
                nan[AT] = nan[AT] || lacks && MUTANT != FORGETS
            };
            if
            :: DEAD
            :: d_step { !DEAD && (MUTANT == NO_BARRIER || met[AT] == WARPS) ->
                    assert(met[AT] == WARPS);
                    assert(!lacks || nan[AT]);
                    through[AT]++;
                    k++
                }
            fi
        fi
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
    atomic {
        for (i : 0 .. N - 1) {
            for (j : 0 .. WARPS - 1) { run warp(i, j) }
        }
        run death()
    }
    ended == N * WARPS;
    d_step {
        for (i : 0 .. N * WARPS * 2 * N - 1) { assert(FAILURES || slot[i] == 0) }
    }
}
