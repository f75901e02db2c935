// Chooses the instantiation for a level's filter, tile and pool.

namespace lasem_fast {
namespace LASEM_ISA {

// Calls body with the algorithm as the type of its first argument and the pool as that of its
// second.
template <int kN>
struct Int {
  static constexpr int value = kN;
};
template <class T>
struct Type {
  using type = T;
};

template <class F, class Body>
static void with_pool(int64_t pool, const Body& body) {
  if (pool == 1) return body(Type<F>{}, Int<1>{});
  if (pool == 2) return body(Type<F>{}, Int<2>{});
  body(Type<F>{}, Int<3>{});
}

template <class Body>
static void with_winograd(const LevelPlan& p, const Body& body) {
  if (p.shape.filter == 5) return with_pool<Winograd<2, 5>>(p.shape.pool, body);
  if (p.shape.toeplitz) return with_pool<Toeplitz>(p.shape.pool, body);
  if (p.shape.tile == 2) return with_pool<Winograd<2, 3>>(p.shape.pool, body);
  if (p.shape.tile == 3) return with_pool<Winograd<3, 3>>(p.shape.pool, body);
  with_pool<Winograd<4, 3>>(p.shape.pool, body);
}

template <class Body>
static void with_algorithm(const LevelPlan& p, const Body& body) {
  if (p.shape.filter == 5 || p.shape.tile > 1) return with_winograd(p, body);
  if (p.shape.pool == 1) return body(Type<Direct<2>>{}, Int<1>{});
  if (p.shape.pool == 2) return body(Type<Direct<2>>{}, Int<2>{});
  body(Type<Direct<3>>{}, Int<3>{});
}

static void run_pack(const LevelPlan& p, const void* const* weights, void* packed, int64_t begin,
                     int64_t end) {
  with_algorithm(p, [&](auto algorithm, auto) {
    pack<typename decltype(algorithm)::type>(p, weights, static_cast<Scalar*>(packed), begin, end);
  });
}

static void run_forward(const LevelPlan& p, const LevelForward& args, void* scratch, int64_t begin,
                        int64_t end) {
  with_algorithm(p, [&](auto algorithm, auto pool) {
    forward_blocks<typename decltype(algorithm)::type, decltype(pool)::value>(
        p, args, static_cast<Scalar*>(scratch), begin, end);
  });
}

static void run_pack_back(const LevelPlan& p, const void* const* weights, void* packed,
                          int64_t begin, int64_t end) {
  with_algorithm(p, [&](auto algorithm, auto) {
    pack_back<typename decltype(algorithm)::type>(p, weights, static_cast<Scalar*>(packed), begin,
                                                  end);
  });
}

static void run_backward(const LevelPlan& p, const LevelBackward& args, void* scratch, int64_t task,
                         int64_t begin, int64_t end) {
  with_algorithm(p, [&](auto algorithm, auto pool) {
    backward_images<typename decltype(algorithm)::type, decltype(pool)::value>(
        p, args, static_cast<Scalar*>(scratch), task, begin, end);
  });
}

// By panel, which only Winograd goes.
static void run_gather_inputs(const LevelPlan& p, const LevelForward& args, void* scratch,
                              int64_t block) {
  with_winograd(p, [&](auto algorithm, auto) {
    gather_inputs<typename decltype(algorithm)::type>(p, args, static_cast<Scalar*>(scratch),
                                                      block);
  });
}

static void run_forward_panel(const LevelPlan& p, const LevelForward& args, void* scratch,
                              int64_t panel) {
  with_winograd(p, [&](auto algorithm, auto pool) {
    forward_panel<typename decltype(algorithm)::type, decltype(pool)::value>(
        p, args, static_cast<Scalar*>(scratch), panel);
  });
}

static void run_gather_both(const LevelPlan& p, const LevelBackward& args, void* scratch,
                            int64_t block) {
  with_winograd(p, [&](auto algorithm, auto pool) {
    gather_both<typename decltype(algorithm)::type, decltype(pool)::value>(
        p, args, static_cast<Scalar*>(scratch), block);
  });
}

static void run_weight_grad_panel(const LevelPlan& p, const LevelBackward& args, void* scratch,
                                  int64_t panel) {
  with_winograd(p, [&](auto algorithm, auto) {
    weight_grad_panel<typename decltype(algorithm)::type>(p, args, static_cast<Scalar*>(scratch),
                                                          panel);
  });
}

static void run_input_grad_panel(const LevelPlan& p, const LevelBackward& args, void* scratch,
                                 int64_t panel) {
  with_winograd(p, [&](auto algorithm, auto) {
    input_grad_panel<typename decltype(algorithm)::type>(p, args, static_cast<Scalar*>(scratch),
                                                         panel);
  });
}

static void run_add_input_grads(const LevelPlan& p, const LevelBackward& args, void* scratch,
                                int64_t block) {
  with_winograd(p, [&](auto algorithm, auto pool) {
    add_input_grads<typename decltype(algorithm)::type, decltype(pool)::value>(
        p, args, static_cast<Scalar*>(scratch), block);
  });
}

static void run_finish(const LevelPlan& p, const LevelBackward& args, int64_t begin, int64_t end) {
  if (p.by_window) return finish_windows(p, args, begin, end);
  with_algorithm(p, [&](auto algorithm, auto) {
    finish<typename decltype(algorithm)::type>(p, args, begin, end);
  });
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
