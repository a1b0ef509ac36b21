// The faces of a mesh that are closest to points, found by a tree of boxes.

#include "simd.h"

#include <numeric>
#include <utility>

namespace {

constexpr int64_t LEAF = 4;  // faces of a node that is not split
constexpr int64_t DEPTH = 64;  // of the tree, which halves the faces with every level

struct Box {
    double low[3], high[3];

    Box() {
        std::fill_n(low, 3, std::numeric_limits<double>::infinity());
        std::fill_n(high, 3, -std::numeric_limits<double>::infinity());
    }

    void add(const double* p) {
        for (int d = 0; d < 3; ++d) {
            low[d] = std::min(low[d], p[d]);
            high[d] = std::max(high[d], p[d]);
        }
    }

    // The squared distance to a point.
    double square(const double* p) const {
        double sum = 0;
        for (int d = 0; d < 3; ++d) {
            const double gap = std::max({low[d] - p[d], p[d] - high[d], 0.0});
            sum += gap * gap;
        }
        return sum;
    }
};

// A node holds faces [begin, end) of the order. Its first child stands behind it, its second one at
// `other`, which is zero for a leaf.
struct Node {
    Box box;
    int64_t begin, end, other;
};

inline double dot3(const double* a, const double* b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

inline void minus3(const double* a, const double* b, double* out) {
    for (int d = 0; d < 3; ++d) out[d] = a[d] - b[d];
}

// The squared distance from a point to a segment.
inline double to_edge(const double* p, const double* start, const double* end) {
    double edge[3], offset[3];
    minus3(end, start, edge);
    minus3(p, start, offset);
    const double length = std::max(dot3(edge, edge), std::numeric_limits<double>::min());
    const double t = std::min(std::max(dot3(offset, edge) / length, 0.0), 1.0);
    for (int d = 0; d < 3; ++d) offset[d] -= t * edge[d];
    return dot3(offset, offset);
}

// The squared distance from a point to a triangle; a degenerate one is its edges.
inline double to_face(const double* p, const double* a, const double* b, const double* c) {
    double ab[3], ac[3], ap[3];
    minus3(b, a, ab);
    minus3(c, a, ac);
    minus3(p, a, ap);
    const double bb = dot3(ab, ab), bc = dot3(ab, ac), cc = dot3(ac, ac);
    const double pb = dot3(ap, ab), pc = dot3(ap, ac), det = bb * cc - bc * bc;
    double least = std::min({to_edge(p, a, b), to_edge(p, b, c), to_edge(p, c, a)});
    if (det > 0) {
        const double v = (cc * pb - bc * pc) / det, w = (bb * pc - bc * pb) / det;
        if (v >= 0 && w >= 0 && v + w <= 1) {
            for (int d = 0; d < 3; ++d) ap[d] -= v * ab[d] + w * ac[d];
            least = std::min(least, dot3(ap, ap));
        }
    }
    return least;
}

class Tree {
public:
    Tree(int64_t F, const double* vertices, const int64_t* faces)
        : vertices(vertices), faces(faces), order(F), centre(3 * F) {
        std::iota(order.begin(), order.end(), 0);
        for (int64_t f = 0; f < F; ++f)
            for (int d = 0; d < 3; ++d)
                centre[3 * f + d] = corner(f, 0)[d] + corner(f, 1)[d] + corner(f, 2)[d];
        nodes.reserve(2 * F / LEAF + 2);
        build(0, F);
    }

    // The largest coordinate.
    double extent() const {
        const Box& box = nodes[0].box;
        double most = 0;
        for (int d = 0; d < 3; ++d) most = std::max({most, std::abs(box.low[d]), std::abs(box.high[d])});
        return most;
    }

    // The squared distance to the closest face.
    double least(const double* p) const {
        double best = std::numeric_limits<double>::infinity();
        visit(p, best, [&](int64_t f) {
            best = std::min(best, to_face(p, corner(f, 0), corner(f, 1), corner(f, 2)));
        });
        return best;
    }

    // Calls found(face) for every face within a squared distance.
    template <class Found>
    void within(const double* p, double most, const Found& found) const {
        visit(p, most, [&](int64_t f) {
            if (to_face(p, corner(f, 0), corner(f, 1), corner(f, 2)) <= most) found(f);
        });
    }

private:
    const double* vertices;
    const int64_t* faces;
    std::vector<int64_t> order;
    std::vector<double> centre;
    std::vector<Node> nodes;

    const double* corner(int64_t f, int i) const { return vertices + 3 * faces[3 * f + i]; }

    int64_t build(int64_t begin, int64_t end) {
        const int64_t here = nodes.size();
        nodes.push_back({Box(), begin, end, 0});
        Box box, centres;
        for (int64_t i = begin; i < end; ++i) {
            for (int k = 0; k < 3; ++k) box.add(corner(order[i], k));
            centres.add(centre.data() + 3 * order[i]);
        }
        nodes[here].box = box;
        if (end - begin <= LEAF) return here;
        int axis = 0;
        for (int d = 1; d < 3; ++d)
            if (centres.high[d] - centres.low[d] > centres.high[axis] - centres.low[axis]) axis = d;
        const int64_t middle = begin + (end - begin) / 2;
        std::nth_element(order.begin() + begin, order.begin() + middle, order.begin() + end,
                         [&](int64_t f, int64_t g) {
                             return centre[3 * f + axis] < centre[3 * g + axis];
                         });
        build(begin, middle);
        const int64_t other = build(middle, end);
        nodes[here].other = other;
        return here;
    }

    // Calls look(face) for the faces of all leaves that are within `most`, which may shrink
    // meanwhile; nearer children first.
    template <class Look>
    void visit(const double* p, const double& most, const Look& look) const {
        std::pair<int64_t, double> stack[DEPTH];
        int64_t size = 0;
        stack[size++] = {0, nodes[0].box.square(p)};
        while (size) {
            const auto [at, square] = stack[--size];
            if (!(square <= most)) continue;
            const Node& node = nodes[at];
            if (node.other == 0) {
                for (int64_t i = node.begin; i < node.end; ++i) look(order[i]);
                continue;
            }
            std::pair<int64_t, double> one{at + 1, nodes[at + 1].box.square(p)};
            std::pair<int64_t, double> other{node.other, nodes[node.other].box.square(p)};
            if (one.second < other.second) std::swap(one, other);
            stack[size++] = one;
            stack[size++] = other;
        }
    }
};

}  // namespace

extern "C" {

// Pairs of a point and a face that is as close as any, up to rounding, for the first points, whose
// pairs have room; `found` tells how many points and how many pairs these are. There is room for one
// point with all faces.
int64_t near_faces(int64_t M, int64_t N, int64_t F, int64_t room, const double* points,
                   const double* vertices, const int64_t* faces, int64_t* row, int64_t* face,
                   int64_t* found) {
    if (F < 1 || room < F || !inside(3 * F, faces, N)) return OUT_OF_RANGE;
    const Tree tree(F, vertices, faces);
    const double extent = tree.extent();
    std::vector<double> most(M);
#pragma omp parallel for schedule(dynamic, 64) if (M > 256)
    for (int64_t i = 0; i < M; ++i) {
        const double distance = std::sqrt(tree.least(points + 3 * i)) * (1 + 1e-9) + 1e-12 * extent;
        most[i] = distance * distance;
    }
    int64_t done = 0, pairs = 0;
    for (; done < M; ++done) {
        int64_t next = pairs;
        tree.within(points + 3 * done, most[done], [&](int64_t f) {
            if (next < room) row[next] = done, face[next] = f;
            ++next;
        });
        if (next > room) break;
        pairs = next;
    }
    found[0] = done, found[1] = pairs;
    return DONE;
}
}
