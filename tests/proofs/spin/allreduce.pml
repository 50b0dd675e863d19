/* One channel of every rank, through the kernels of three calls. See docs/verification.md; run by test_spin.py.
 *
 * A channel meets its peers only in slots, and its own rank only at kernel boundaries. A slot holds 0 (poisoned) or
 * the number of the kernel, plus one, whose packet lies in it. Asserted: a packet lands in an empty slot, a packet
 * that is read is of this kernel, and without failures all slots are empty at the end. A hang is an invalid end state.
 *
 * What is merged, and why it may be. The first assertion is the harder to keep the earlier packets land and the later
 * slots are poisoned; and a rank that waits for a late packet might as well be slow after it. So
 * - packets land when they may first be pushed, at all peers; a rank that dies leaves any part of them behind;
 * - a kernel poisons its slots, completes and lets the next one pass its wait in one step;
 * - a wait for all peers is one step: what has landed stays until it is poisoned, by the first assertion;
 * - a rank that gives up is not followed further, whatever has landed here: something may still be on its way, and
 *   all that it does later is to poison its own slots, which nobody else reads. To its peers it is slow for ever.
 * Other channels: a call in which this channel is idle passes at once, as if the others needed no time. Launches of
 * a streamed call lean on each other; there some channel is active in every launch, and all that is used of it is
 * that a launch is complete only when every rank has passed the wait of the same launch (RIDE).
 *
 * Memory. Of the buffers of a streamed call, FIRST, LAST and FINAL are those of two-shot, which takes turns with it by one
 * epoch; MIDDLE and OTHER may alias the slots of one-shot, in any way. In the model they coincide with two buffers of
 * it. A slot may as well alias one of another channel or another source, which a model of one channel cannot show. So
 * the same is asserted of kernels (ANYWHERE), which are complete only with all of their channels; then kernels of both
 * kinds never use a slot at the same time, wherever it lies:
 * - A packet lands in MIDDLE or OTHER only where all earlier calls are complete. It is pushed after something was heard
 *   from every peer in this call, and a peer says nothing in it before its full wait.
 * - A packet of one-shot lands only where every launch that used MIDDLE or OTHER is complete. No such launch
 *   is the last of its call. Who completed the last one has gathered packets of it from every peer, pushed after
 *   the peer's own griddepcontrol.wait there, when its launch before was complete and had poisoned everything.
 */
#ifndef N
#define N 4             /* ranks: 2 to 4 */
#endif
#ifndef CALLS
#define CALLS 3
#endif
#ifndef STREAMS
#define STREAMS 0       /* whether calls may be streamed; otherwise, whether this channel may be idle */
#endif
#ifndef FAILURES
#define FAILURES 0      /* whether every rank may give up, and rank 0 die, at any moment */
#endif
#ifndef LENGTH
#define LENGTH 0        /* launches of a streamed call; 0: 2, 3 or 5 */
#endif

/* Buffers: one-shot 0 and 1, two-shot's scatter 2 and 3, its gather 4, two that no other algorithm has. */
#define SHARED(buffer) ((buffer) < 2)
#define BUFFERS (5 + 2 * STREAMS)
/* A streamed call scatters through three in turn, from FIRST in the first launch to LAST in the last one ... */
#ifndef FIRST
#define FIRST (2 + two_parity)
#endif
#ifndef MIDDLE
#define MIDDLE 1        /* where it lies: 0, 1, 5 or 6 */
#endif
#ifndef LAST
#define LAST (3 - two_parity)
#endif
/* ... and gathers through two: FINAL in the last launch and every second one before it, OTHER in the rest. */
#ifndef FINAL
#define FINAL 4
#endif
#ifndef OTHER
#define OTHER 0         /* where it lies: 0, 1, 5 or 6, but not with MIDDLE */
#endif
#ifndef ANYWHERE
#define ANYWHERE 1      /* whether MIDDLE and OTHER may alias one-shot's slots of other channels and sources, too */
#endif

/* Planted mistakes, by -DMUTANT=... */
#define NONE 0
#define ONE_PARITY 1            /* one-shot has one buffer instead of two */
#define SCATTER_WITHOUT_PARITY 2/* two-shot scatters through one buffer */
#define NO_POISON 3             /* slots are not poisoned after reading */
#define PUSH_BEFORE_WAIT 4      /* every kernel pushes before its griddepcontrol.wait */
#define STALE_EPOCH 5           /* a rank reads the epoch before the wait */
#define SHARED_SLOTS 6          /* one-shot and two-shot use the same slots, each with its own epoch */
#define SILENT_RANK 7           /* the last rank has nothing to add, says nothing, and nobody waits for it */
#define GATHER_FIRST 8          /* the gathered packet does not wait for the scattered ones */
#define POISON_AFTER_KERNEL 9   /* a kernel counts as complete before it has poisoned */
#define IDLE_ADVANCES 10        /* one rank counts a call in which it is idle as an epoch */
#define WRONG_PARITY 11         /* gathered packets of a single launch go where the next scattered ones will */
#define TRIGGER_FIRST 12        /* launches trigger before their wait */
#define TRIGGER_AFTER_WAIT 13   /* launches trigger after their wait, but before they have received anything */
#define NOBODY_ACTIVE 14        /* launches in which no channel is active */
#define KEEPS_PUSHING 15        /* a rank that gave up goes on pushing */
#define REJOINS 16              /* a rank that gave up takes part again in the next kernel */
#define NO_DEADLINE 17          /* nobody gives up */
#define ONE_DIRECTION 18        /* the scatter buffers are taken in the same direction, whatever the number of launches */
#define GATHER_FROM_FRONT 19    /* the gather buffers alternate from the first launch, not from the last */
#define STREAM_ADVANCES 20      /* the last launch of a streamed call ends an epoch */
#ifndef MUTANT
#define MUTANT NONE
#endif

/* Forms of a kernel. RIDE: a launch of a streamed call in which this channel is idle. */
#define IDLE 0
#define ONE_SHOT 1
#define TWO_SHOT 2
#define STREAM 3
#define RIDE 4

#define SLOT(owner, buffer, source) slot[((owner) * BUFFERS + (buffer)) * N + (source)]
#define PARITY(bit, without) (MUTANT == without -> 0 : bit)
#define SCATTER_AT (MUTANT == SHARED_SLOTS -> 0 : 2)
#define FIRST_BUFFER(k) \
    (form[k] == ONE_SHOT -> PARITY(one_parity, ONE_PARITY) : \
    (form[k] == TWO_SHOT -> SCATTER_AT + PARITY(two_parity, SCATTER_WITHOUT_PARITY) : SCATTER(k)))
#define SECOND_BUFFER(k) (form[k] == STREAM -> GATHER(k) : (MUTANT == WRONG_PARITY -> 3 - two_parity : 4))

/* In turn: in the direction that ends with LAST. No direction does if the number of launches is 1 modulo 3. */
#define DIRECTION(k) (MUTANT == ONE_DIRECTION || launches[k] % 3 == 0 -> 1 : 2)
#define TURN(k) (launch[k] * DIRECTION(k) % 3)
#define SCATTER(k) (TURN(k) == 0 -> FIRST : (TURN(k) == 1 -> MIDDLE : LAST))
#define TO_COME(k) (MUTANT == GATHER_FROM_FRONT -> launch[k] : launches[k] - 1 - launch[k])
#define GATHER(k) (TO_COME(k) % 2 == 0 -> FINAL : OTHER)

#if !STREAMS
#define KERNELS CALLS
#elif LENGTH
#define KERNELS (CALLS * LENGTH)
#else
#define KERNELS (CALLS * 5)
#endif
byte form[KERNELS];
byte launch[KERNELS];   /* place in the streamed call ... */
byte launches[KERNELS]; /* ... of so many */
byte used[KERNELS];     /* the last kernel before this one that used MIDDLE or OTHER, plus one */
byte kernels;           /* how many there are */
byte slot[N * BUFFERS * N];
byte waited[N];         /* the last kernel whose wait a rank passed, plus one: all before it are complete there */
byte started[N];        /* the last kernel that runs, at least up to its wait, plus one */
byte ended;

#define ALL ((1 << N) - 1)
#define EVERYBODY_STARTED(k) (started[0] > k && started[1] > k && started[2 % N] > k && started[3 % N] > k)
#define MUTE(rank) (MUTANT == SILENT_RANK && (rank) == N - 1)
#define HERE(source, buffer) (source >= N || source == me || MUTE(source) || SLOT(me, buffer, source % N) != 0)
#define ARRIVED(buffer) (HERE(0, buffer) && HERE(1, buffer) && HERE(2, buffer) && HERE(3, buffer))
#define COMPLETE(kernels, rank) ((kernels) == 0 || waited[rank] > (kernels)) /* so many, the first ones */
#define MAY_LAND(k, buffer, rank) \
    (!SHARED(buffer) || COMPLETE((form[k] == STREAM -> k - launch[k] : used[k]), rank))
#define EVERYBODY_WAITED(k) (waited[0] > k && waited[1] > k && waited[2 % N] > k && waited[3 % N] > k)

/* The kernel after the running one may push before its wait, once its predecessor has triggered: a thread of every
 * block, of whatever channel, has passed the wait there and has received a packet of every peer. */
#define EARLY(k) \
    (form[k] == STREAM && launch[k] > 0 || form[k] != IDLE && form[k] != RIDE && MUTANT == PUSH_BEFORE_WAIT)
#define TRIGGERED(k) \
    (MUTANT == TRIGGER_FIRST || waited[me] == k + 1 && (MUTANT == TRIGGER_AFTER_WAIT || EVERYBODY_STARTED(k)))

/* Where a rank is in kernel k. */
#define HOP_1 0         /* waits for the first packets */
#define HOP_2 1         /* waits for the gathered ones */
#define RIDING 2        /* waits for other channels */
#define OVER 3
#define NOTHING 255

inline push(kernel, buffer) {
    for (peer : 0 .. N - 1) {
        if
        :: peer != me && !MUTE(me) && (reach >> peer & 1) ->
            assert(SLOT(peer, buffer, me) == 0);
            assert(!ANYWHERE || MAY_LAND(kernel, buffer, peer));
            SLOT(peer, buffer, me) = kernel + 1
        :: else
        fi
    }
    peer = 0;
    step = (reach == ALL -> step : OVER)
}

inline receive(buffer) {
    for (peer : 0 .. N - 1) {
        if
        :: peer != me && !MUTE(peer) -> assert(SLOT(me, buffer, peer) == k + 1)
        :: else
        fi
    }
    peer = 0
}

inline poison(buffer) {
    for (peer : 0 .. N - 1) {
        SLOT(me, buffer, peer) = (MUTANT == NO_POISON -> SLOT(me, buffer, peer) : 0)
    }
    peer = 0
}

inline settle() {
    if
    :: owed != NOTHING -> poison(owed); owed = NOTHING
    :: else
    fi
}

/* Kernel k starts, and its griddepcontrol.wait returns. */
inline start() {
    do
    :: k < kernels && form[k] == IDLE ->
        if
        :: MUTANT == IDLE_ADVANCES && me == 0 -> one_parity = !one_parity; two_parity = !two_parity
        :: else
        fi;
        k++
    :: else -> break
    od;
    if
    :: k == kernels -> step = OVER; settle()
    :: k < kernels && form[k] == RIDE -> waited[me] = k + 1; started[me] = k + 1; step = RIDING
    :: k < kernels && form[k] != RIDE ->
        waited[me] = k + 1; started[me] = k + 1;
        step = HOP_1;
        buffer = FIRST_BUFFER(k);
        if
        :: MUTANT == STALE_EPOCH && me == 0 && k > 0 && form[k] == ONE_SHOT && form[k - (k > 0)] == ONE_SHOT ->
            buffer = 1 - buffer
        :: else
        fi;
        if
        :: pushed > k
        :: else -> pushed = k + 1; push(k, buffer)
        fi;
        if
        :: MUTANT == GATHER_FIRST && form[k] != ONE_SHOT -> target = SECOND_BUFFER(k); push(k, target); target = 0
        :: else
        fi
    fi
}

inline complete() {
    if
    :: form[k] == ONE_SHOT -> one_parity = !one_parity
    :: form[k] == TWO_SHOT || MUTANT == STREAM_ADVANCES && form[k] == STREAM && launch[k] == launches[k] - 1 ->
        two_parity = !two_parity
    :: else
    fi;
    k++;
    start()
}

proctype rank(byte me) {
    byte k, step;
    byte pushed;                    /* kernels before this one have pushed their first packets */
    byte reach = ALL;               /* whom its next packets reach; if not all, it dies of it */
    byte buffer;                    /* polled now */
    byte scattered;                 /* of this kernel, still to be poisoned */
    byte owed = NOTHING;            /* poisoned only in the next kernel (mutant) */
    bit one_parity, two_parity;
    byte peer, target;              /* scratch */

    d_step { start() };
    do
    :: step == OVER -> break

    /* A rank dies, or gives up: its deadline has passed, or a peer's abort has arrived. */
    :: d_step { FAILURES && (MUTANT < KEEPS_PUSHING || MUTANT == NO_DEADLINE && me == 0) -> step = OVER }
    :: d_step { FAILURES && MUTANT == KEEPS_PUSHING && step == HOP_1 && form[k] != ONE_SHOT ->
            scattered = buffer; buffer = SECOND_BUFFER(k); step = HOP_2; push(k, buffer)
        }
    :: d_step { FAILURES && (MUTANT == REJOINS || MUTANT == KEEPS_PUSHING && (step == HOP_2 || form[k] == ONE_SHOT)) ->
            poison(buffer);
            if
            :: step == HOP_2 -> poison(scattered)
            :: else
            fi;
            complete()
        }
    /* Rank 0 will die within its next push. */
    :: FAILURES && reach == ALL && me == 0 ->
        if
        :: reach = 2
        :: N > 2 -> reach = 4
        :: N > 3 -> reach = 8
        :: N > 3 -> reach = 2 + 4
        :: N > 3 -> reach = 2 + 8
        :: N > 3 -> reach = 4 + 8
        fi

    /* The next kernel runs already, and pushes before its griddepcontrol.wait. */
    :: d_step { pushed > k && pushed < kernels && EARLY(pushed) && TRIGGERED(pushed - 1) ->
            target = FIRST_BUFFER(pushed); push(pushed, target); target = 0;
            pushed++;
            started[me] = pushed
        }

    :: d_step { step == HOP_1 && ARRIVED(buffer) ->
            receive(buffer);
            settle();
            if
            :: form[k] == ONE_SHOT && MUTANT == POISON_AFTER_KERNEL -> owed = buffer; complete()
            :: form[k] == ONE_SHOT && MUTANT != POISON_AFTER_KERNEL -> poison(buffer); complete()
            :: form[k] != ONE_SHOT ->
                scattered = buffer; buffer = SECOND_BUFFER(k); step = HOP_2;
                if
                :: MUTANT != GATHER_FIRST -> push(k, buffer)
                :: else
                fi
            fi
        }
    :: d_step { step == HOP_2 && ARRIVED(buffer) ->
            receive(buffer); poison(buffer); poison(scattered); complete()
        }
    :: d_step { step == RIDING && (EVERYBODY_WAITED(k) || MUTANT == NOBODY_ACTIVE) ->
            pushed = k + 1; complete()
        }
    od;
    ended++
}

inline add(what, place, total) {
    form[kernels] = what;
    launch[kernels] = place;
    launches[kernels] = total;
    used[kernels] = last;
    if
    :: what >= STREAM && (SHARED(MIDDLE) && TURN(kernels) == 1 || SHARED(OTHER) && TO_COME(kernels) % 2 == 1) ->
        last = kernels + 1
    :: else
    fi;
    kernels++
}

init {
    byte i, busy, length, call, last;
    bit two_parity;  /* MIDDLE may be planted as FIRST */
    atomic {
        for (call : 1 .. CALLS) {
            if
            :: add(ONE_SHOT, 0, 1)
            :: add(TWO_SHOT, 0, 1)
            :: !STREAMS -> add(IDLE, 0, 1)
            :: STREAMS ->
                if
                :: !LENGTH -> length = 2
                :: !LENGTH -> length = 3
                :: !LENGTH -> length = 5
                :: LENGTH -> length = LENGTH
                fi;
                if /* this channel is active in the first launches only, or in all */
                :: busy = 1
                :: length > 2 -> busy = length - 1
                :: busy = length
                fi;
                for (i : 0 .. length - 1) {
                    if
                    :: i < busy -> add(STREAM, i, length)
                    :: else -> add(RIDE, i, length)
                    fi
                };
                busy = 0; length = 0
            fi
        }
        run rank(0);
        run rank(1);
        if
        :: N > 2 -> run rank(2)
        :: else
        fi;
        if
        :: N > 3 -> run rank(3)
        :: else
        fi
    }
    ended == N;
    d_step {
        for (i : 0 .. N * BUFFERS * N - 1) { assert(FAILURES || slot[i] == 0) }
    }
}
