// What kernels that use Hopper's tensor copy engine add to hopper.cuh: copies of boxes of tensors that report to a barrier,
// stores of boxes.

// A tensor map, made by cuTensorMapEncodeTiled on the host; a kernel takes it as `const __grid_constant__ TensorMap`.
struct __align__(64) TensorMap {
    u64 words[16];
};

// Arrives, and has the phase wait for so many bytes of copies.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void fetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// A box of a four-dimensional tensor; coordinates may lie outside, zeros come from there.
DEVICE void copy_box(u32 target, const TensorMap& map, u32 barrier, int c, int x, int y, int image) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(image)
                 : "memory");
}
// A box of a five-dimensional tensor.
DEVICE void copy_box(u32 target, const TensorMap& map, u32 barrier, int c, int x, int parity, int y, int image) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(c), "r"(x), "r"(parity), "r"(y), "r"(image)
                 : "memory");
}
// A box of a three-dimensional tensor.
DEVICE void copy_box(u32 target, const TensorMap& map, u32 barrier, int column, int phase, int row) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(column), "r"(phase), "r"(row)
                 : "memory");
}
// A box of a matrix.
DEVICE void copy_box(u32 target, const TensorMap& map, u32 barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row)
                 : "memory");
}
DEVICE void store_box(const TensorMap& map, u32 source, int c, int x, int y, int image) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map), "r"(source), "r"(c),
                 "r"(x), "r"(y), "r"(image)
                 : "memory");
}
// A box of a matrix; what lies outside of it is not written.
DEVICE void store_box(const TensorMap& map, u32 source, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(source), "r"(column), "r"(row)
                 : "memory");
}
// A box of a five-dimensional tensor.
DEVICE void store_box(const TensorMap& map, u32 source, int c, int x, int parity, int y, int image) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map), "r"(source), "r"(c),
                 "r"(x), "r"(parity), "r"(y), "r"(image)
                 : "memory");
}
DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
DEVICE void stores_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void stores_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Waits until at most LEFT of the groups committed are still at work.
template <int LEFT> DEVICE void products_left() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
