// What host and device share. allreduce_jit/abi.py describes the layout; abi_constants.cuh and abi_layout.cuh are made from
// it at compile time. The latter asserts every offset and size: a field that moved on one side only does not compile.
#pragma once
#include "layout.cuh"
#include "abi_constants.cuh"

// The kernel argument, by value. Only input and output differ between two calls of one shape.
struct Args {
    u64 staging[MAX_RANKS];  // of each rank, as mapped in this process: a Header, then the slots
    u64 own;                 // = staging[rank]
    u64 input, output;       // the user's tensors, on this GPU, from this launch's first element on; may be equal
    u64 numel;               // elements of this launch
    u64 total;               // elements of the whole call, for the signature
    u64 slots;               // offset of this algorithm's slots in the staging memory
    u64 channels;            // Channel per channel of this algorithm, local
    u64 control;             // Control, local
    u64 report;              // Report, host memory
    u32 rank;
    u32 capacity;  // slots per (buffer, source)
    u32 tag;       // dtype and algorithm, for the signature
    u32 shape_id;  // which flag of Control.handshaken belongs to calls of this shape
    u32 launch;    // number of this launch within the call, from 0
    u32 scatter;   // buffers of a stream's launch (two_shot.cu)
    u32 gather;
    u32 last;  // whether it completes what a guard began: the last launch of a stream, any other launch
};

// The argument of a kernel that normalizes the rows of the sum, by value. Absent tensors are 0.
struct NormArgs {
    Args call;         // whole rows; its output is the norm, or what that is quantized to
    u64 residual;      // as the input; from this launch's first row on, as all tensors but the weight and a static scale
    u64 residual_out;
    u64 weight;        // hidden elements
    u64 norm;          // where the output is quantized: the norm
    u64 scale;         // of the quantized output: fp32, read (static) or written
    float eps;
    u32 scale_row;    // elements of the scales from one row to the next
    u32 scale_group;  // and from one group to the next
    u32 reserved;
    u64 parameters;   // what the signature tells beside Args: hidden, flags, eps
};

// What a call tells its peers of itself. Each 8-byte half carries the sequence number, so it proves its own arrival.
struct Signature {
    u32 numel, sequence;      // the lower half of the number of elements
    u32 tag, sequence_again;  // dtype, algorithm, IN_PLACE, and the upper half from NUMEL_SHIFT on
};

// First in the staging memory: what peers may write besides packets.
struct Header {
    u32 abort;  // 0, or an abort code: this rank's kernels must stop
    u32 reserved[63];
    Signature signatures[2][MAX_RANKS];  // per parity of the sequence number, per source
    Signature parameters[2][MAX_RANKS];  // the same for NormArgs.parameters, in place of numel and tag
    u32 unused[832];
};

// A rank's own, in device memory; its channels follow.
template <u32 SHAPES, u32 UNUSED>
struct ControlOf {
    u32 sequence;     // calls that were signed, by this rank and all others
    u32 completed;    // calls whose last channel is done
    u64 deadline_ns;  // how long to wait for a peer in a shape of call that is handshaken; 0 = for ever
    u64 grace_ns;     // the same until it is: the peer may still compile, or load a model
    u32 reported;     // whether the report is taken
    u32 entered;      // calls that began
    u32 handshaken[SHAPES];  // per shape of call: whether all ranks have taken part in one
    u32 channels;                // how many there are of all algorithms together
    u32 abort;                   // where the staging memory is on the host: 0, or why this rank's kernels must stop, near to them
    u32 unused[UNUSED];
    u64 table[MAX_RANKS];  // of the Triton kernels
};
typedef ControlOf<MAX_SHAPES, 4070> Control;
typedef ControlOf<2, 2> SmallControl;

// What a channel keeps from call to call; one load reads both.
struct Channel {
    u32 epoch;
    u32 stopped;  // this rank was stopped: push no more
};

// Why waits ended, for the host.
struct Report {
    u32 code;      // an abort code: kind | culprit << CULPRIT_SHIFT | rank that found out << FINDER_SHIFT. Written last
    u32 sequence;  // of the call; 0: whoever reports does not know, Control.sequence tells
    u32 tag, buffer, channel, waited_ms;
    u32 mine[2], theirs[2];  // signatures that differ: numel, tag
};

#include "abi_layout.cuh"
