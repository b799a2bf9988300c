// What kernels add to tensor_copies.cuh whose blocks run in clusters: copies that reach all of them, arrivals at each other's
// barriers. A block's rank is its index modulo the cluster's size.

DEVICE void barriers_are_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
template <int SIZE> DEVICE void cluster_barrier() {
    if (SIZE == 1) return;
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// A warp's arrival at the same barrier of every block.
template <int SIZE> DEVICE void arrive_everywhere(u32 barrier, int lane) {
    if (SIZE == 1) {
        if (lane == 0) barrier_arrive(barrier);
    } else if (lane < SIZE) {
        asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(barrier),
                     "r"(lane)
                     : "memory");
    }
}
// `barrier_wait` for arrivals of other blocks.
DEVICE void barrier_wait_cluster(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

// A box of a matrix to the same place of every block; each block's own barrier hears of it.
template <int SIZE> DEVICE void copy_box_to_all(u32 target, const TensorMap& map, u32 barrier, int column, int row) {
    if (SIZE == 1) return copy_box(target, map, barrier, column, row);
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"((u16)((1 << SIZE) - 1))
                 : "memory");
}
// The same of a five-dimensional tensor.
template <int SIZE> DEVICE void copy_box_to_all(u32 target, const TensorMap& map, u32 barrier, int a, int b, int c, int d, int e) {
    if (SIZE == 1) return copy_box(target, map, barrier, a, b, c, d, e);
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(
            target),
        "l"(&map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e), "h"((u16)((1 << SIZE) - 1))
        : "memory");
}

// Has the L2 fetch `bytes`, a multiple of 16.
DEVICE void fetch_ahead(const void* source, int bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory"); }
