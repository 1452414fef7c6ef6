// Four registers of one kind: each step is taken of all four before the next, so that a long chain of dependent steps
// keeps the processor busy. Operators are those of the registers.

template <class V>
struct Four {
  V v[4];
};

template <class V>
using Lane = typename std::remove_reference<decltype(V{}[0])>::type;

template <class Make>
DPK_INLINE auto each_of_four(Make make) -> Four<decltype(make(0))> {
  return {{make(0), make(1), make(2), make(3)}};
}

#define DPK_FOUR(op)                                                                                 \
  template <class V>                                                                                 \
  DPK_INLINE Four<V> operator op(const Four<V>& a, const Four<V>& b) {                               \
    return each_of_four([&](int i) __attribute__((always_inline)) { return V(a.v[i] op b.v[i]); }); \
  }                                                                                                  \
  template <class V>                                                                                 \
  DPK_INLINE Four<V> operator op(const Four<V>& a, Lane<V> b) {                                      \
    return each_of_four([&](int i) __attribute__((always_inline)) { return V(a.v[i] op b); });      \
  }                                                                                                  \
  template <class V>                                                                                 \
  DPK_INLINE Four<V> operator op(Lane<V> a, const Four<V>& b) {                                      \
    return each_of_four([&](int i) __attribute__((always_inline)) { return V(a op b.v[i]); });      \
  }
DPK_FOUR(+)
DPK_FOUR(-)
DPK_FOUR(*)
DPK_FOUR(/)
DPK_FOUR(&)
DPK_FOUR(|)
DPK_FOUR(^)
DPK_FOUR(<<)
DPK_FOUR(>>)
#undef DPK_FOUR

template <class V>
DPK_INLINE Four<V> operator~(const Four<V>& a) {
  return each_of_four([&](int i) __attribute__((always_inline)) { return V(~a.v[i]); });
}
template <class V>
DPK_INLINE Four<V> operator-(const Four<V>& a) {
  return each_of_four([&](int i) __attribute__((always_inline)) { return V(-a.v[i]); });
}

template <class To, class From>
DPK_INLINE Four<To> as(const Four<From>& a) {
  return each_of_four([&](int i) __attribute__((always_inline)) { return as<To>(a.v[i]); });
}

// A mask is all ones or all zeros in each lane.
DPK_INLINE Four<vl> at_least(const Four<vd>& a, double b) {
  return each_of_four([&](int i) __attribute__((always_inline)) { return vl(a.v[i] >= splat(b)); });
}
DPK_INLINE Four<vd> select(const Four<vl>& mask, const Four<vd>& yes, const Four<vd>& no) {
  return each_of_four([&](int i) __attribute__((always_inline)) { return vd(mask.v[i] ? yes.v[i] : no.v[i]); });
}

DPK_INLINE Four<vd> square_root(const Four<vd>& a) {
#if defined(__AVX512F__)
  return each_of_four([&](int i) __attribute__((always_inline)) { return vd(_mm512_sqrt_pd(a.v[i])); });
#elif defined(__AVX2__)
  return each_of_four([&](int i) __attribute__((always_inline)) { return vd(_mm256_sqrt_pd(a.v[i])); });
#else
  Four<vd> root;
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < D; ++lane) root.v[i][lane] = __builtin_sqrt(a.v[i][lane]);
  }
  return root;
#endif
}
